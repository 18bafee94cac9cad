"""Methods for long sequences on keys by hand: hundreds of edits later the update is still the equation's, and the state
no larger."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kecore.model import SiteId
from kecore_methods.locate.betaedit import free_directions
from kecore_methods.locate.lyaplock import SiteHistory
from kecore_methods.locate.rlsedit import Recursion

D_IN, D_OUT, EDITS = 12, 5, 40
SITE = SiteId(0)


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def problem(random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a second moment of keys ``[d_in, d_in]`` and the inverse of its factor."""
    samples = torch.randn(60, D_IN, generator=random, dtype=torch.float64)
    moment = samples.t() @ samples / 60
    lower = torch.linalg.cholesky(moment)
    return moment, torch.linalg.solve_triangular(lower, torch.eye(D_IN, dtype=torch.float64), upper=False)


def numbers(state: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values())


def test_the_recursion_is_the_whole_inverse(random: torch.Generator) -> None:
    moment, factor = problem(random)
    weight = 0.5
    system = weight * moment
    state: dict[str, Tensor] = {}
    sizes: list[int] = []
    for _ in range(EDITS):
        keys = torch.randn(D_IN, 2, generator=random)
        residuals = torch.randn(D_OUT, 2, generator=random)
        system = system + keys.double() @ keys.double().t()
        found = Recursion(state, SITE, factor.float()).write(keys, residuals, None, weight, absolute=True)
        wanted = residuals.double() @ torch.linalg.solve(system, keys.double()).t()
        error = float(((found.U @ found.V.t()).double() - wanted).norm() / wanted.norm())
        assert error < 1e-4
        sizes.append(numbers(state))
    assert max(sizes) <= 1.25 * D_IN**2 + 2 * D_IN + 1
    assert max(sizes) == max(sizes[: EDITS // 2])


def test_columns_that_share_a_group_are_one_residual(random: torch.Generator) -> None:
    """A group with two equal keys of weight one half has the update of one key."""
    _, factor = problem(random)
    key, residual = torch.randn(D_IN, 1, generator=random), torch.randn(D_OUT, 1, generator=random)
    root = 0.5**0.5
    shares = torch.full((2, 1), root)
    twice = Recursion({}, SITE, factor.float()).write(
        torch.cat([key, key], 1) * root, residual, shares, 0.1, absolute=False
    )
    once = Recursion({}, SITE, factor.float()).write(key, residual, None, 0.1, absolute=False)
    torch.testing.assert_close(twice.U @ twice.V.t(), once.U @ once.V.t(), rtol=1e-4, atol=1e-6)
    # A lone edit realises 1 / (1 + preservation) of its residual.
    torch.testing.assert_close(once.U @ (once.V.t() @ key), residual / 1.1, rtol=1e-4, atol=1e-6)


def test_the_queue_holds_back_what_costs_preserved_keys(random: torch.Generator) -> None:
    """With a bound that is reached, preserved keys lose less than with one that is not; the state does not grow."""
    moment, _ = problem(random)
    base = torch.randn(D_OUT, D_IN, generator=random, dtype=torch.float64)
    edits = [(torch.randn(D_IN, 1, generator=random), torch.randn(D_OUT, 1, generator=random)) for _ in range(EDITS)]
    losses: dict[float, list[float]] = {}
    queues: dict[float, float] = {}
    for bound in (3.0, 1e9):
        weight, losses[bound] = base.clone(), []
        state: dict[str, Tensor] = {}
        sizes: list[int] = []
        for keys, values in edits:
            history = SiteHistory(state, SITE)
            history.close(weight, moment, bound)
            residuals = (values.double() - weight @ keys.double()).float()
            found = history.write(keys, residuals, None, moment, 0.2)
            weight = weight + (found.U @ found.V.t()).double()
            losses[bound].append(float(((weight - base) @ moment * (weight - base)).sum()))
            sizes.append(numbers(state))
        queues[bound] = SiteHistory(state, SITE).queue
        assert len(set(sizes[2:])) == 1
    assert queues[1e9] == 1.0
    assert queues[3.0] > 1.0
    assert sum(losses[3.0]) < sum(losses[1e9])
    assert losses[3.0][0] == losses[1e9][0]


def test_free_directions_hold_no_protected_keys(random: torch.Generator) -> None:
    moment, _ = problem(random)
    used = torch.randn(D_IN, 4, generator=random, dtype=torch.float64)
    basis, leaks = free_directions(used @ used.t(), 1e-9, moment)
    assert basis.shape == (D_IN, D_IN - 4)
    torch.testing.assert_close(basis.t() @ used, torch.zeros(D_IN - 4, 4, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(basis.t() @ moment @ basis, torch.diag(leaks), rtol=0, atol=1e-9)
