"""The ops against primal solves and sums in float64, in torch and as compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kecore.api.errors import NonFiniteError, NumericalError, OperandError
from kecore.ops import Solution, kv_solve, kv_solve_batch, loader, second_moment_

D_IN, D_OUT, NEW = 40, 12, 5


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def covariance(d: int = D_IN) -> Tensor:
    """Condition about 1e5, as key statistics with a ridge have it."""
    basis = torch.linalg.qr(randn(d, d, seed=0).double()).Q
    return basis @ torch.diag(torch.logspace(-3, 2, d).double()) @ basis.t()


def inverse_factor(c: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(
        torch.linalg.cholesky(c), torch.eye(len(c), dtype=c.dtype), upper=False
    ).float()


@pytest.fixture(params=["native", "torch"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs against the compiled library, which must be there, and against torch."""
    native = loader.active_backend()
    assert native.library is not None, native.reason
    chosen = native if request.param == "native" else loader.Backend("torch", "a test asks for it")
    monkeypatch.setattr(loader, "_resolved", chosen)
    return str(request.param)


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
    assert torch.equal(total.triu(1), start.triu(1))


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


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def lower(keys: Tensor) -> Tensor:
    return (keys.double().t() @ keys.double()).tril()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 63, 129, 1030])  # odd, past the sums in registers, past a packed chunk
@pytest.mark.parametrize("width", [1, 15, 47, 49, 200])  # vectors, panels and blocks that end early
def test_second_moment_of_any_shape(backend: str, dtype: torch.dtype, tokens: int, width: int) -> None:
    keys = randn(tokens, width, seed=9).to(dtype)
    total = torch.zeros(width, width, dtype=torch.float64)
    second_moment_(total, keys)
    assert error(total, lower(keys)) < (1e-6 if backend == "native" else 3e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_second_moment_is_accurate_where_sums_are_long(dtype: torch.dtype) -> None:
    """Positive keys: the sums grow with every token. bfloat16 and float16 keys are never rounded, nor is float32."""
    keys = (1 + randn(9000, 60, seed=10).abs() / 3).to(dtype)
    total = torch.zeros(60, 60, dtype=torch.float64)
    second_moment_(total, keys)
    assert error(total, lower(keys)) < 1e-6
    assert float(((total - lower(keys)).diagonal() / lower(keys).diagonal()).abs().max()) < 2e-6


def test_float16_keys_at_the_ends_of_their_range() -> None:
    keys = torch.tensor([[65504.0, 6e-8], [-65504.0, 6.1e-5], [1.0, -0.0]], dtype=torch.float16)
    total = torch.zeros(2, 2, dtype=torch.float64)
    second_moment_(total, keys)
    assert error(total, lower(keys)) < 1e-6
    assert total[1, 1].item() == pytest.approx(lower(keys)[1, 1].item(), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_second_moment_of_chosen_tokens(dtype: torch.dtype) -> None:
    """What is left out may hold anything."""
    keys = randn(300, 70, seed=11).to(dtype)
    mask = randn(300, seed=12) > 0
    keys[~mask] = float("nan")
    wanted = lower(keys[mask])
    for choice in ({"mask": mask}, {"rows": mask.nonzero().flatten()}):
        total = torch.zeros(70, 70, dtype=torch.float64)
        second_moment_(total, keys, **choice)
        assert error(total, wanted) < 1e-6


def test_rows_count_as_often_as_they_are_named() -> None:
    keys, rows = randn(5, 3, seed=13), torch.tensor([4, 0, 4])
    total = torch.zeros(3, 3, dtype=torch.float64)
    second_moment_(total, keys, rows=rows)
    assert error(total, lower(keys[rows])) < 1e-6


@pytest.mark.parametrize("choice", [{"mask": torch.zeros(4, dtype=torch.bool)}, {"rows": torch.empty(0).long()}])
def test_nothing_chosen_adds_nothing(choice: dict[str, Tensor]) -> None:
    total = randn(3, 3, seed=14)
    assert torch.equal(second_moment_(total.clone(), torch.full((4, 3), float("nan")), **choice), total)


def test_second_moment_of_several_layers() -> None:
    """More layers than one call of the kernel takes, of different widths, in a common mask."""
    widths = [8 + 13 * i for i in range(19)]
    keys = [randn(40, d, seed=d).bfloat16() for d in widths]
    moments = [randn(d, d, seed=100 + d).double() for d in widths]
    starts = [m.clone() for m in moments]
    mask = randn(40, seed=15) > 0
    assert second_moment_(moments, keys, mask=mask) is moments
    for moment, start, x in zip(moments, starts, keys, strict=True):
        assert error(moment - start, lower(x[mask])) < 1e-6
    assert second_moment_([], []) == []


def test_second_moment_of_views() -> None:
    """Offsets, gaps between rows, and keys whose columns are apart."""
    store = randn(50, 90, seed=16)
    room = torch.zeros(60, 80, dtype=torch.float64)
    for keys in (store[3:40, 5:52], store[::2, 10:57], store[:47, :50].t(), store[:40, :47].flip(0)):
        room.zero_()
        total = room[7 : 7 + keys.shape[1], 11 : 11 + keys.shape[1]]
        second_moment_(total, keys)
        assert error(total, lower(keys)) < 1e-6
        total.zero_()
        assert not room.any()


def test_what_is_not_finite_stays_in_its_column() -> None:
    keys = randn(20, 60, seed=17)
    keys[4, 50] = float("inf")
    total = torch.zeros(60, 60, dtype=torch.float64)
    second_moment_(total, keys)
    finite = torch.isfinite(total)
    assert not finite[50:, 50].any()
    assert not finite[50, :51].any()
    assert int((~finite).sum()) == 60


def test_precision_does_not_depend_on_what_the_caller_allows() -> None:
    keys = randn(500, 40, seed=18)
    total = torch.zeros(40, 40, dtype=torch.float64)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            second_moment_(total, keys)
            solution = kv_solve(randn(60, 5, seed=1), randn(4, 5, seed=2), 0.5, inverse_factor(covariance(60)))
    finally:
        torch.set_float32_matmul_precision(before)
    assert error(total, lower(keys)) < 1e-6
    assert error(matrix(solution), memit(randn(60, 5, seed=1), randn(4, 5, seed=2), 0.5, covariance(60))) < 1e-4


BAD_MOMENTS = {
    "expected as many": (lambda: ([torch.zeros(3, 3)], [])),
    "keys of float32": (lambda: (torch.zeros(3, 3), torch.zeros(2, 3, dtype=torch.float64))),
    "and a moment of float64": (lambda: (torch.zeros(3, 3, dtype=torch.bfloat16), torch.zeros(2, 3))),
    "of one type": (lambda: ([torch.zeros(3, 3)] * 2, [torch.zeros(2, 3), torch.zeros(2, 3).half()])),
    "one device": (lambda: (torch.zeros(3, 3, device="meta"), torch.zeros(2, 3))),
    "rows are contiguous": (lambda: (torch.zeros(3, 3).t(), torch.zeros(2, 3))),
    "got strides": (lambda: (torch.zeros(3).expand(3, 3), torch.zeros(2, 3))),
    "share no memory": (lambda: ([torch.zeros(3, 3)] * 2, [torch.zeros(2, 3)] * 2)),
}


@pytest.mark.parametrize("message", BAD_MOMENTS)
def test_bad_moments_are_refused(message: str) -> None:
    moment, keys = BAD_MOMENTS[message]()
    with pytest.raises(OperandError, match=message):
        second_moment_(moment, keys)


def test_keys_inside_their_moment_are_refused() -> None:
    total = torch.zeros(6, 6)
    with pytest.raises(OperandError, match="share no memory"):
        second_moment_(total, total[2:4])


def test_moments_of_many_experts_are_told_apart() -> None:
    """Keys may be one tensor for all; of moments side by side in one tensor, two that overlap are found."""
    moments = list(torch.zeros(300, 2, 2))
    second_moment_(moments, [torch.ones(1, 2)] * 300)
    assert all(float(moment.tril().sum()) == 3 for moment in moments)
    shared = torch.zeros(5, 2)
    with pytest.raises(OperandError, match="share no memory"):
        second_moment_([*moments, shared[:2], shared[3:], shared[1:3]], [torch.ones(1, 2)] * 303)


def test_keys_whose_rows_overlap_are_keys() -> None:
    for keys in (torch.arange(4.0).expand(3, 4), torch.arange(6.0).unfold(0, 4, 1)):
        total = torch.zeros(4, 4)
        second_moment_(total, keys)
        assert torch.equal(total.tril(), (keys.T @ keys).tril())


def test_the_residual_is_that_of_the_factors_as_returned() -> None:
    """Of a system so ill-conditioned that float32 factors lose digits, which its Gram matrix does not know."""
    keys = randn(40, 1, seed=0).expand(40, 6) + 3e-6 * randn(40, 6, seed=1)
    residuals = randn(5, 6, seed=2)
    solution = kv_solve(keys, residuals, 0.0)
    given = solution.U.double() @ (solution.V.double().T @ keys.double())
    missed = float((given - residuals.double()).norm() / residuals.double().norm())
    assert missed > 1e-3
    assert solution.edit_residual == pytest.approx(missed, rel=1e-6)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"rows": torch.tensor([0]), "mask": torch.ones(2, dtype=torch.bool)}, "got both"),
        ({"mask": torch.ones(2)}, "mask .tokens. of bool"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "for 2 tokens, got .3,."),
        ({"rows": torch.tensor([0], dtype=torch.int32)}, "rows .n. of int64"),
        ({"rows": torch.tensor([[0]])}, "rows .n. of int64"),
        ({"rows": torch.tensor([0, 2])}, "from 0 to 1, got 0 to 2"),
        ({"rows": torch.tensor([-1])}, "from 0 to 1, got -1 to -1"),
        ({"rows": torch.empty(0, dtype=torch.int64, device="meta")}, "on the keys' cpu, got meta"),
    ],
)
def test_bad_choices_are_refused(choice: dict[str, Tensor], message: str) -> None:
    with pytest.raises(OperandError, match=message):
        second_moment_(torch.zeros(3, 3), torch.zeros(2, 3), **choice)


def memit(keys: Tensor, residuals: Tensor, ridge: float, c: Tensor | None = None) -> Tensor:
    """``R Kᵀ (αC + KKᵀ)⁻¹`` in float64."""
    k, r = keys.double(), residuals.double()
    c = torch.eye(len(k), dtype=k.dtype) if c is None else c
    return r @ torch.linalg.solve(ridge * c + k @ k.t(), k).t()


@pytest.mark.parametrize("shared", [True, False])
def test_batch_solves_each_system(shared: bool) -> None:
    batch, n = 7, 4
    keys, residuals = randn(batch, 50, n, seed=20), randn(batch, 9, n, seed=21)
    ridge = torch.linspace(0.1, 3, batch)
    c = [covariance(50) * (1 if shared else i + 1) for i in range(batch)]
    factor = inverse_factor(c[0]) if shared else torch.stack([inverse_factor(x) for x in c])
    found = kv_solve_batch(keys, residuals, ridge, factor)
    for i in range(batch):
        wanted = memit(keys[i], residuals[i], float(ridge[i]), c[i])
        assert error(found.U[i].double() @ found.V[i].double().t(), wanted) < 1e-4
        assert float(found.edit_residual[i]) == pytest.approx(error(wanted @ keys[i].double(), residuals[i]), abs=1e-4)
        alone = kv_solve(keys[i], residuals[i], float(ridge[i]), factor if shared else factor[i])
        assert alone.condition == pytest.approx(float(found.condition[i]), rel=1e-3)


def test_an_empty_batch_has_no_solutions() -> None:
    found = kv_solve_batch(torch.zeros(0, 8, 2), torch.zeros(0, 3, 2), torch.zeros(0))
    assert (found.V.shape, found.edit_residual.shape) == ((0, 8, 2), (0,))


@pytest.mark.parametrize(("d", "n"), [(1, 1), (47, 3), (96, 50), (130, 90), (300, 65), (700, 160)])
def test_solves_of_any_shape(d: int, n: int) -> None:
    keys, residuals, c = randn(d, n, seed=22), randn(5, n, seed=23), covariance(d)
    solution = kv_solve(keys, residuals, 2.0, inverse_factor(c))
    assert error(matrix(solution), memit(keys, residuals, 2.0, c)) < 2e-4


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("old", [0, 30])
def test_more_keys_than_columns_take_the_primal_form(factored: bool, old: int) -> None:
    d, n = 20, 45
    keys, residuals, c = randn(d, n, seed=24), randn(6, n - old, seed=25), covariance(d)
    target = torch.cat([torch.zeros(6, old), residuals], 1)
    solution = kv_solve(keys, residuals, 0.5, inverse_factor(c) if factored else None)
    wanted = memit(keys, target, 0.5, c if factored else None)
    assert error(matrix(solution), wanted) < 1e-4
    assert solution.V.shape == (d, n - old)
    new = keys[:, old:].double()
    assert solution.edit_residual == pytest.approx(error(wanted @ new, residuals), abs=1e-4)


def test_least_squares_need_no_ridge() -> None:
    keys, residuals = randn(6, 40, seed=26), randn(3, 40, seed=27)
    wanted = torch.linalg.lstsq(keys.t().double(), residuals.t().double()).solution.t()
    assert error(matrix(kv_solve(keys, residuals, 0.0)), wanted) < 1e-5


def test_condition_1e8_is_solved_where_float32_fails() -> None:
    d, n = 400, 60
    basis = torch.linalg.qr(randn(d, d, seed=28).double()).Q
    c = basis @ torch.diag(torch.logspace(-8, 0, d).double()) @ basis.t()
    keys = (torch.linalg.cholesky(c) @ randn(d, n, seed=29).double()).float()
    residuals = randn(7, n, seed=30)
    wanted = memit(keys, residuals, 1.0, c)
    assert error(matrix(kv_solve(keys, residuals, 1.0, inverse_factor(c))), wanted) < 1e-3
    single = residuals @ torch.linalg.solve(c.float() + keys @ keys.t(), keys).t()
    assert not error(single.double(), wanted) < 1e-1


def test_factor_of_a_larger_matrix(keys: Tensor, residuals: Tensor) -> None:
    """A view with an offset and a stride, and one whose columns are contiguous."""
    factor = inverse_factor(covariance())
    room = torch.full((D_IN + 5, D_IN + 9), float("nan"))
    room[2 : 2 + D_IN, 4 : 4 + D_IN] = factor
    wanted = kv_solve(keys, residuals, 0.5, factor)
    for view in (room[2 : 2 + D_IN, 4 : 4 + D_IN], factor.t().contiguous().t()):
        assert error(matrix(kv_solve(keys, residuals, 0.5, view)), matrix(wanted)) < 1e-6


def test_the_batch_says_which_system_is_singular() -> None:
    keys = randn(4, 30, 3, seed=31)
    keys[2, :, 1] = keys[2, :, 0]
    with pytest.raises(NumericalError, match=r"the 3 keys of system 2 are linearly dependent") as caught:
        kv_solve_batch(keys, randn(4, 5, 3, seed=32), torch.zeros(4))
    ridge = float(str(caught.value).split()[-1])
    kv_solve_batch(keys, randn(4, 5, 3, seed=32), torch.full((4,), ridge))


def test_a_negative_ridge_makes_an_indefinite_system(keys: Tensor, residuals: Tensor) -> None:
    with pytest.raises(NumericalError, match="use a ridge of at least"):
        kv_solve(keys, residuals, -1e3, inverse_factor(covariance()))


BAD_SYSTEMS = {
    "at least one key": (lambda k, r: (k[:, :0], r[:, :0], 1.0)),
    "inverse factor .40, 40. of float32": (lambda k, r: (k, r, 1.0, torch.eye(D_IN).double())),
    "or one a system, got .3, 3.": (lambda k, r: (k, r, 1.0, torch.eye(3))),
    "at most a residual a key": (lambda k, r: (k[:, :2], r, 1.0)),
    "and shares .1, 9, 5.": (lambda k, r: (k, r, 1.0, None, torch.ones(9, 5))),
    "of a floating type, got torch.int64": (lambda k, r: (k.long(), r, 1.0)),
    "expected residuals on the keys' cpu, got meta": (lambda k, r: (k, r.to("meta"), 1.0)),
    "expected keys .batch, d_in, n.": (lambda k, r: (k[0], r, 1.0)),
}


@pytest.mark.parametrize("message", BAD_SYSTEMS)
def test_bad_systems_are_refused(keys: Tensor, residuals: Tensor, message: str) -> None:
    with pytest.raises(OperandError, match=message):
        kv_solve(*BAD_SYSTEMS[message](keys, residuals))


def test_each_system_needs_a_ridge() -> None:
    with pytest.raises(OperandError, match="one ridge a system"):
        kv_solve_batch(torch.ones(2, 3, 1), torch.ones(2, 3, 1), torch.ones(3))
