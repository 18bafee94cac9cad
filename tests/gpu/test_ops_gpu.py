"""The ops on a CUDA device: streams, views, determinism, and no wait for the device. Sums against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kecore.ops import kv_solve, kv_solve_batch, loader, reference, second_moment_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda")
F64 = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def exact(keys: Tensor) -> Tensor:
    x = keys.cpu().double()
    return x.t() @ x


def error(found: Tensor, expected: Tensor) -> float:
    """Largest error of the lower triangle relative to sqrt(C_ii C_jj)."""
    size = expected.diagonal().sqrt()
    return float(((found.cpu().double() - expected).tril() / (size[:, None] * size)).abs().max())


def needs_cuda_kernels() -> None:
    backend = loader.active_backend()
    if backend.cuda:
        pytest.skip(f"CUDA tensors run in torch here: {backend.cuda}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "d"), [(1, 1), (33, 130), (700, 264), (5000, 1536)])
def test_second_moment_is_the_sum(tokens: int, d: int, dtype: torch.dtype) -> None:
    keys = random(tokens, d).to(dtype)
    moment = torch.zeros(d, d, dtype=F64, device=DEVICE)
    second_moment_(moment, keys)
    assert error(moment, exact(keys)) < 3e-6


@pytest.mark.parametrize(
    "view",
    [lambda x: x[:, 3:], lambda x: x[5:, :128], lambda x: x[::2], lambda x: x[:, :136:2]],
    ids=["columns from an odd one", "rows and columns", "every other row", "every other column"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_second_moment_takes_views(view: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    keys = view(random(300, 144).to(dtype))
    moment = torch.zeros(keys.shape[1], keys.shape[1], dtype=F64, device=DEVICE)
    second_moment_(moment, keys)
    assert error(moment, exact(keys)) < 3e-6


def test_second_moment_of_layers_rows_and_mask() -> None:
    keys = [random(400, d, seed=d).bfloat16() for d in (128, 200, 64)]
    rows = torch.arange(0, 400, 3, device=DEVICE)
    mask = torch.zeros(400, dtype=torch.bool, device=DEVICE)
    mask[rows] = True
    by_rows = [torch.zeros(k.shape[1], k.shape[1], dtype=F64, device=DEVICE) for k in keys]
    by_mask = [m.clone() for m in by_rows]
    second_moment_(by_rows, keys, rows=rows)
    second_moment_(by_mask, keys, mask=mask)
    for k, a, b in zip(keys, by_rows, by_mask, strict=True):
        assert error(a, exact(k[rows])) < 3e-6
        assert error(b, exact(k[rows])) < 3e-6


def test_second_moment_is_deterministic() -> None:
    keys = random(40000, 520).bfloat16()
    moments = [torch.zeros(520, 520, dtype=F64, device=DEVICE) for _ in range(2)]
    for moment in moments:
        second_moment_(moment, keys)
    assert torch.equal(*moments)


def test_second_moment_works_on_the_current_stream() -> None:
    needs_cuda_kernels()
    moment = torch.zeros(256, 256, dtype=F64, device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        keys = random(3000, 256).bfloat16()
        for _ in range(20):  # long enough that a kernel on another stream would read too early
            keys = (keys.float() * 1.01).bfloat16()
        second_moment_(moment, keys)
    side.synchronize()
    assert error(moment, exact(keys)) < 3e-6


def test_second_moment_does_not_wait_for_the_device() -> None:
    needs_cuda_kernels()
    keys = random(100, 64).bfloat16()
    moment = torch.zeros(64, 64, dtype=F64, device=DEVICE)
    rows = torch.arange(50, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.kecore.second_moment_([moment], [keys], rows, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert error(moment, exact(keys[:50])) < 3e-6


def test_second_moment_leaves_the_upper_triangle() -> None:
    moment = torch.full((200, 200), 7.0, dtype=F64, device=DEVICE)
    second_moment_(moment, random(64, 200).half())
    assert bool((moment.triu(1) == torch.full_like(moment, 7.0).triu(1)).all())


@pytest.mark.parametrize(("batch", "d", "n"), [(1, 40, 1), (3000, 64, 4), (7, 500, 33), (2, 900, 64), (2, 900, 65)])
def test_small_systems_equal_torch(batch: int, d: int, n: int) -> None:
    white, ridge = random(batch, d, n), random(batch).abs().double() + 0.1
    found, expected = (solve(white, ridge, None) for solve in (solve_op(n), reference.gram_solve))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def solve_op(n: int) -> Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]:
    """The op; torch beyond the columns that the CUDA kernel takes, as kv_solve chooses."""
    loader.active_backend()  # loads the kernels
    return torch.ops.kecore.gram_solve if n <= 64 else reference.gram_solve


def test_one_indefinite_system_does_not_spoil_the_others() -> None:
    white, ridge = random(5, 30, 6), torch.ones(5, dtype=F64, device=DEVICE)
    ridge[2] = -1e6
    _, weights, pivots = solve_op(6)(white, ridge, None)
    _, expected, _ = reference.gram_solve(white, ridge.abs(), None)
    others = torch.tensor([0, 1, 3, 4], device=DEVICE)
    assert float(pivots[2, 1]) == 0.0
    torch.testing.assert_close(weights[others], expected[others], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [1, 20, 100])
def test_kv_solve_equals_the_cpu(n: int) -> None:
    keys, residuals = random(300, n), random(50, n, seed=1)
    factor = random(300, 300, seed=2).tril() / 70 + torch.eye(300, device=DEVICE)
    here = kv_solve(keys, residuals, 0.5, factor)
    there = kv_solve(keys.cpu(), residuals.cpu(), 0.5, factor.cpu())
    torch.testing.assert_close(here.V.cpu(), there.V, rtol=1e-3, atol=1e-5 * float(there.V.abs().max()))
    assert here.edit_residual == pytest.approx(there.edit_residual, rel=1e-3, abs=1e-5)
    assert here.condition == pytest.approx(there.condition, rel=1e-3)


def test_thousands_of_single_edits_in_one_call() -> None:
    keys, residuals = random(4000, 96, 1), random(4000, 8, 1, seed=1)
    found = kv_solve_batch(keys, residuals, torch.zeros(4000, dtype=F64, device=DEVICE))
    written = found.U @ found.V.mT @ keys
    torch.testing.assert_close(written, residuals, rtol=1e-3, atol=1e-4)
