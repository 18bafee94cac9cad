"""The torch implementations against primal solves and sums in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kecore.errors import NonFiniteError, NumericalError
from kecore.ops import Solution, kv_solve, second_moment_

D_IN, D_OUT, NEW = 40, 12, 5


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def covariance() -> Tensor:
    """Condition about 1e5, as key statistics with a ridge have it."""
    basis = torch.linalg.qr(randn(D_IN, D_IN, seed=0).double()).Q
    return basis @ torch.diag(torch.logspace(-3, 2, D_IN).double()) @ basis.t()


def inverse_factor(c: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(
        torch.linalg.cholesky(c), torch.eye(len(c), dtype=c.dtype), upper=False
    ).float()


@pytest.fixture
def keys() -> Tensor:
    return randn(D_IN, NEW, seed=1)


@pytest.fixture
def residuals() -> Tensor:
    return randn(D_OUT, NEW, seed=2)


def matrix(solution: Solution) -> Tensor:
    assert solution.U.dtype == solution.V.dtype == torch.float32
    return solution.U.double() @ solution.V.double().t()


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("ridge", [0.01, 1.0, 15000.0])
def test_memit(keys: Tensor, residuals: Tensor, ridge: float) -> None:
    """``R Kᵀ (λC + KKᵀ)⁻¹`` (arXiv 2210.07229, eq. 14)."""
    c, k, r = covariance(), keys.double(), residuals.double()
    wanted = r @ k.t() @ torch.linalg.inv(ridge * c + k @ k.t())
    solution = kv_solve(keys, residuals, ridge, inverse_factor(c))
    assert error(matrix(solution), wanted) < 1e-4
    assert solution.edit_residual == pytest.approx(error(wanted @ k, r), abs=1e-4)
    assert (
        error(
            matrix(kv_solve(keys, residuals, ridge)), r @ k.t() @ torch.linalg.inv(ridge * torch.eye(D_IN) + k @ k.t())
        )
        < 1e-5
    )


def test_emmet_and_rome_write_exactly(keys: Tensor, residuals: Tensor) -> None:
    """``R (KᵀC⁻¹K)⁻¹ KᵀC⁻¹`` (arXiv 2403.14236, eq. 9); one key makes it ROME's."""
    c = covariance()
    for n in (NEW, 1):
        k, r = keys[:, :n].double(), residuals[:, :n].double()
        white = torch.linalg.solve(c, k)
        solution = kv_solve(keys[:, :n], residuals[:, :n], 0.0, inverse_factor(c))
        assert error(matrix(solution) @ k, r) < 1e-4
        assert error(matrix(solution), r @ torch.linalg.inv(k.t() @ white) @ white.t()) < 1e-3
        assert solution.edit_residual < 1e-6


def test_alphaedit_keeps_earlier_keys_at_zero(keys: Tensor, residuals: Tensor) -> None:
    """``R K̃ᵀ (L2·I + KpKpᵀ + K̃K̃ᵀ)⁻¹`` over projected keys (arXiv 2410.02355, eq. 13)."""
    before, l2 = randn(D_IN, 7, seed=3), 0.3
    k, p, r = keys.double(), before.double(), residuals.double()
    wanted = r @ k.t() @ torch.linalg.inv(l2 * torch.eye(D_IN) + p @ p.t() + k @ k.t())
    solution = kv_solve(torch.cat([before, keys], 1), residuals, l2)
    assert (solution.U.shape, solution.V.shape) == ((D_OUT, NEW), (D_IN, NEW))
    assert error(matrix(solution), wanted) < 1e-5
    assert solution.edit_residual == pytest.approx(error(wanted @ k, r), rel=1e-4)
    strict = matrix(kv_solve(torch.cat([before, keys], 1), residuals, 0.0))
    assert error(strict @ k, r) < 1e-5
    assert float((strict @ p).norm() / r.norm()) < 1e-5


@pytest.mark.parametrize("previous", [0, 3])
def test_shares_say_which_residual_a_key_is_mapped_to(residuals: Tensor, previous: int) -> None:
    columns, shares = randn(D_IN, 9, seed=4), randn(9, NEW, seed=5)
    before = randn(D_IN, previous, seed=6)
    c, ridge = covariance(), 0.5
    target = residuals.double() @ shares.double().t()
    k = torch.cat([before, columns], 1).double()
    wanted = torch.cat([torch.zeros(D_OUT, previous), target], 1) @ k.t() @ torch.linalg.inv(ridge * c + k @ k.t())
    solution = kv_solve(torch.cat([before, columns], 1), residuals, ridge, inverse_factor(c), shares)
    assert error(matrix(solution), wanted) < 1e-4
    assert solution.U.shape == (D_OUT, NEW)
    assert solution.edit_residual == pytest.approx(error(wanted @ columns.double(), target), abs=1e-4)


def test_condition_is_the_systems(keys: Tensor, residuals: Tensor) -> None:
    """An estimate from the pivots: never above the condition number, and of its order."""
    gram = keys.double().t() @ keys.double()
    gram += 0.1 * torch.eye(NEW)
    condition = float(torch.linalg.cond(gram))
    assert condition / 10 < kv_solve(keys, residuals, 0.1).condition <= condition


def test_keys_of_any_size_are_solved_alike(keys: Tensor, residuals: Tensor) -> None:
    """Squared float32 norms of 1e-25 and 1e25 are beyond float32."""
    for scale in (1e-18, 1e18):
        solution = kv_solve(scale * keys, residuals, 0.0)
        assert error(matrix(solution) @ (scale * keys).double(), residuals.double()) < 1e-4


def test_dependent_keys_need_a_ridge_and_are_told_which(keys: Tensor, residuals: Tensor) -> None:
    keys = torch.cat([keys, keys[:, :1]], 1)
    residuals = torch.cat([residuals, -residuals[:, :1]], 1)
    with pytest.raises(NumericalError, match=r"6 keys are linearly dependent .* a ridge of at least (\S+)$") as caught:
        kv_solve(keys, residuals, 0.0)
    ridge = float(str(caught.value).split()[-1])
    solution = kv_solve(keys, residuals, ridge)
    assert bool(torch.isfinite(solution.V).all())
    with pytest.raises(NumericalError):
        kv_solve(torch.zeros(D_IN, 2), residuals[:, :2], 0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(keys: Tensor, residuals: Tensor, bad: float) -> None:
    with pytest.raises(NonFiniteError, match="must be finite"):
        kv_solve(keys * bad, residuals, 1.0)
    with pytest.raises(NonFiniteError, match="must be finite"):
        kv_solve(keys, residuals * bad, 1.0)


def test_inputs_are_left_alone_and_no_gradient_is_kept(keys: Tensor, residuals: Tensor) -> None:
    copies = keys.clone(), residuals.clone()
    solution = kv_solve(keys.requires_grad_(True), residuals, 0.5)
    assert torch.equal(keys, copies[0])
    assert torch.equal(residuals, copies[1])
    assert not solution.V.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("moment", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("width", [1, 7, 512, 700])  # panels of 512 columns
def test_second_moment_adds_the_lower_triangle(dtype: torch.dtype, moment: torch.dtype, width: int) -> None:
    keys = randn(90, width, seed=7).to(dtype)
    start = randn(width, width, seed=8).to(moment)
    total = start.clone()
    assert second_moment_(total, keys) is total
    wanted = keys.double().t() @ keys.double()
    added = (total - start).double()
    assert float((added.tril() - wanted.tril()).abs().max()) < 1e-3
    assert error(added.tril(), wanted.tril()) < 1e-5
    assert torch.equal(total.triu(1)[:512, 512:], start.triu(1)[:512, 512:])


def test_second_moment_of_many_calls_does_not_lose_digits() -> None:
    """2 ** 24 + 1 is beyond float32; a float64 moment counts on."""
    total = torch.full((1, 1), 2.0**24, dtype=torch.float64)
    for _ in range(5):
        second_moment_(total, torch.ones(1, 1))
    assert total.item() == 2.0**24 + 5


def test_second_moment_of_no_tokens_is_nothing() -> None:
    total = randn(3, 3, seed=1)
    assert torch.equal(second_moment_(total.clone(), torch.zeros(0, 3)), total)


@pytest.mark.parametrize(("moment", "keys"), [((3, 3), (5, 4)), ((3, 4), (5, 3)), ((3, 3), (5,)), ((3, 3), (2, 5, 3))])
def test_second_moment_says_which_shapes_it_takes(moment: tuple[int, ...], keys: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected moment \[d, d\] and keys \[tokens, d\], got "):
        second_moment_(torch.zeros(moment), torch.zeros(keys))
