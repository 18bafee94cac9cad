"""The preservation stage against float64 solves of the normal equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kecore.engine.keys import Keys
from kecore.engine.solve import least_squares, one_by_one
from kecore.model import SiteId
from kecore.ops import Solution
from kecore.statistics import KeyStatistics
from kecore_methods.locate.alphaedit import NullSpace
from kecore_methods.locate.evoedit import outside

D_IN, D_OUT = 24, 10


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment() -> Tensor:
    sample = randn(200, D_IN, seed=0).double() * torch.linspace(0.2, 3, D_IN).double()
    return sample.t() @ sample / 200


def inverse_factor(c: Tensor) -> Tensor:
    return torch.linalg.inv(torch.linalg.cholesky(c)).float()


def keys_of(groups: int, contexts: int) -> Keys:
    weight = torch.zeros(groups, groups * contexts)
    for g in range(groups):
        weight[g, g * contexts : (g + 1) * contexts] = 1 / contexts
    return Keys(randn(groups * contexts, D_IN, seed=1), weight)


def matrix(solution: Solution) -> Tensor:
    return solution.U.double() @ solution.V.double().t()


def close(got: Tensor, wanted: Tensor) -> bool:
    return float((got - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("each", [True, False])
def test_absolute_weight_is_memits_lambda(factored: bool, each: bool) -> None:
    """``R̂ K̂ᵀ (λC + K̂K̂ᵀ)⁻¹`` over the mean keys, or over every context's key with its weight."""
    c = moment() if factored else torch.eye(D_IN, dtype=torch.float64)
    keys, residuals = keys_of(3, 4), randn(D_OUT, 3, seed=2)
    factor = inverse_factor(c) if factored else None
    solution = least_squares(keys, residuals, factor, 1.5, absolute=True, each=each)
    if each:
        rows = keys.rows.double()
        kk = sum(float(keys.weight[u, r]) * rows[r, :, None] * rows[r] for u in range(3) for r in range(12))
        rk = sum(
            float(keys.weight[u, r]) * residuals[:, u, None].double() * rows[r] for u in range(3) for r in range(12)
        )
    else:
        mean = torch.stack([keys.weight[u].double() @ keys.rows.double() for u in range(3)])
        kk, rk = mean.t() @ mean, residuals.double() @ mean
    assert isinstance(rk, Tensor)
    assert close(matrix(solution), rk @ torch.linalg.inv(1.5 * c + kk))


@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_a_lone_key_realises_the_share_that_the_relative_weight_says(weight: float, scale: float) -> None:
    keys = Keys(scale * randn(1, D_IN, seed=1), torch.ones(1, 1))
    residuals = randn(D_OUT, 1, seed=2)
    update = matrix(least_squares(keys, residuals, inverse_factor(moment()), weight))
    assert close(update @ keys.rows[0].double(), residuals[:, 0].double() / (1 + weight))


@pytest.mark.parametrize("factored", [True, False])
def test_one_by_one_writes_every_value_exactly_though_keys_overlap(factored: bool) -> None:
    keys, residuals = randn(D_IN, 5, seed=1), randn(D_OUT, 5, seed=2)
    keys[:, 4] = keys[:, 3] + 0.1 * keys[:, 4]
    solution = one_by_one(keys, residuals, inverse_factor(moment()) if factored else None)
    written = matrix(solution) @ keys.double()
    assert close(written[:, 4], residuals[:, 4].double())
    assert solution.edit_residual == pytest.approx(float((written - residuals).norm() / residuals.norm()), rel=1e-4)


def test_one_by_one_is_romes_formula() -> None:
    """``Λ (C⁻¹k)ᵀ`` with ``Λ = r / (C⁻¹k)ᵀk`` (arXiv 2202.05262, eq. 2)."""
    c, key, value = moment(), randn(D_IN, 1, seed=1), randn(D_OUT, 1, seed=2)
    direction = torch.linalg.solve(c, key.double())
    wanted = value.double() @ direction.t() / float(direction.t() @ key.double())
    assert close(matrix(one_by_one(key, value, inverse_factor(c))), wanted)
    bare = randn(D_IN, 1, seed=3)
    update = matrix(one_by_one(key, value, inverse_factor(c), bare))
    assert close(update @ bare.double(), value.double())
    assert close(update, value.double() @ direction.t() / float(direction.t() @ bare.double()))


def test_null_space_takes_out_the_used_directions() -> None:
    basis = torch.linalg.qr(randn(D_IN, D_IN, seed=4).double()).Q
    values = torch.cat([torch.tensor([5.0, 3.0, 2.0]).double(), torch.full((D_IN - 3,), 1e-3).double()])
    statistics = KeyStatistics({SiteId(2): basis @ torch.diag(values) @ basis.t()}, 100, {}, "text")
    keys = randn(D_IN, 4, seed=1)
    for threshold, absolute in ((1.0, False), (1.0, True)):
        space = NullSpace(statistics, SiteId(2), threshold, absolute=absolute)
        assert space.rank == 3
        free = basis[:, 3:]
        assert close(space.project(keys).double(), free @ free.t() @ keys.double())
    assert NullSpace(statistics, SiteId(2), 4.0, absolute=True).rank == 1


def test_outside_is_the_complement_of_strong_directions() -> None:
    """Against a projector from a full decomposition, with a gap in the spectrum at the threshold."""
    taken = randn(D_IN, 7, seed=3) * torch.tensor([3.0, 2, 2, 2, 0.01, 0.01, 0.01])
    keys = randn(D_IN, 4, seed=4)
    u, s, _ = torch.linalg.svd(taken.double())
    strong = u[:, : int((s.square() > 0.5).sum())]
    assert strong.shape[1] == 4
    expected = keys.double() - strong @ strong.t() @ keys.double()
    torch.testing.assert_close(outside([taken], keys, 0.5).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(outside([], keys, 0.5), keys)
