"""Is the native code right on this device? Phases of gpu_check.py; they run on a CPU, too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kecore.ops import kv_solve_batch, second_moment_
from kecore.ops.schema import OPS

__all__ = ["check", "relative", "sanitize"]

Row = dict[str, Any]
BF16, F64 = torch.bfloat16, torch.float64


def relative(found: Tensor, exact: Tensor) -> float:
    """Error in the Frobenius norm; NaN where anything is NaN."""
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-300))


def check(device: torch.device, small: bool) -> list[Row]:
    """Every op over random shapes and types, through the public functions, against float64 on the CPU."""
    return [*check_moment(device, small), *check_solve(device, small), *check_schema(device)]


def exact_moment(keys: Tensor, rows: Tensor | None, mask: Tensor | None) -> Tensor:
    x = keys.cpu().double()
    chosen = rows if rows is not None else mask
    x = x if chosen is None else x[chosen.cpu()]
    return x.t() @ x


def moment_error(found: Tensor, before: Tensor, exact: Tensor) -> float:
    """Largest error of the lower triangle in units of ``sqrt(C_ii C_jj)``; infinite if more than it changed."""
    size = exact.diagonal().clamp(min=1e-300).sqrt()
    off = (found.cpu().double() - before.cpu().double() - exact).tril() / (size[:, None] * size[None, :])
    if not torch.equal(found.triu(1), before.triu(1)):
        return float("inf")
    return float(off.abs().max()) if off.numel() else 0.0


def check_moment(device: torch.device, small: bool) -> list[Row]:
    random = torch.Generator().manual_seed(0)

    def pick(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=random))]

    worst: dict[str, float] = {}
    for _ in range(12 if small else 120):
        dtype, wide = pick(BF16, torch.float16, torch.float32), pick(torch.float32, F64)
        tokens, layers = pick(0, 1, 31, 32, 33, 200, 700), pick(1, 1, 3)
        choice, view = pick("all", "rows", "mask"), pick("whole", "columns", "rows", "turned")
        keys, moments = [], []
        for _ in range(layers):
            d = pick(1, 7, 8, 100) if small else pick(1, 7, 8, 100, 128, 129, 256, 520, 1000)
            base = torch.randn(tokens + 3, d + 5, generator=random).to(dtype)
            shaped = {"whole": base[:tokens, :d].clone(), "columns": base[:tokens, 5:], "rows": base[3:, :d]}
            x = shaped.get(view, base[:tokens, :d].t().contiguous().t()).to(device)
            keys.append(x)
            # Old values of size 1 would add their own rounding to a float32 moment.
            old = torch.randn(d, d, generator=random) if wide == F64 else torch.randn(d, d, generator=random).triu(1)
            moments.append(old.to(device, wide))
        rows = (
            torch.randint(tokens, (pick(0, 5, 300),), generator=random).to(device)
            if choice == "rows" and tokens
            else None
        )
        mask = (torch.rand(tokens, generator=random) < pick(0.0, 0.5, 1.0)).to(device) if choice == "mask" else None
        before = [m.clone() for m in moments]
        second_moment_(moments, keys, rows=rows, mask=mask)
        for x, m, old in zip(keys, moments, before, strict=True):
            error = moment_error(m, old, exact_moment(x, rows, mask))
            name = f"second_moment_ {str(dtype)[6:]}"
            worst[name] = max(worst.get(name, 0.0), error)
    return [{"op": op, "error": error, "limit": 3e-6, "ok": error < 3e-6} for op, error in sorted(worst.items())]


def exact_update(keys: Tensor, ridge: Tensor, factor: Tensor | None, shares: Tensor | None) -> Tensor:
    """``V`` of each system by the formula, in float64 on the CPU: ``[batch, d, u]``."""
    k = keys.cpu().double()
    back = k if factor is None else (factor.cpu().double().t() @ factor.cpu().double()) @ k
    system = k.mT @ back + ridge.cpu()[:, None, None] * torch.eye(k.shape[2], dtype=F64)
    u = k.shape[2] if shares is None else shares.shape[2]
    right = torch.zeros(len(k), k.shape[2], u, dtype=F64)
    if shares is None:
        right[:] = torch.eye(u, dtype=F64)
    else:
        right[:, -shares.shape[1] :] = shares.cpu().double()
    return back @ torch.linalg.solve(system, right)


def check_solve(device: torch.device, small: bool) -> list[Row]:
    random = torch.Generator().manual_seed(1)
    worst = 0.0
    shapes = [(1, 40, 1, 0), (5, 33, 8, 0), (3, 70, 20, 6), (2, 90, 64, 0), (2, 90, 65, 0), (2, 20, 30, 0)]
    for batch, d, n, groups in shapes if small else [*shapes, (2000, 128, 4, 0), (1, 1536, 100, 0), (3, 2048, 64, 8)]:
        keys, ridge = torch.randn(batch, d, n, generator=random), torch.rand(batch, generator=random).double() + 0.1
        u = groups or n
        residuals = torch.randn(batch, 10, u, generator=random)
        shares = torch.rand(batch, n, u, generator=random).double() if groups else None
        lower = torch.randn(d, d, generator=random).tril() / d**0.5 + 2 * torch.eye(d)
        for factor in (None, lower):
            placed = [None if t is None else t.to(device) for t in (keys, residuals, ridge, factor, shares)]
            found = kv_solve_batch(*placed)
            worst = max(worst, relative(found.V.cpu(), exact_update(keys, ridge, factor, shares)))
    return [{"op": "kv_solve", "error": worst, "limit": 1e-5, "ok": worst < 1e-5}]


def check_schema(device: torch.device) -> list[Row]:
    """``torch.library.opcheck``: schema, fake kernels and registration tell the truth."""
    ops = torch.ops.kecore
    keys, moment = torch.randn(20, 8, device=device), torch.zeros(8, 8, dtype=F64, device=device)
    white, ridge = torch.randn(3, 8, 4, device=device), torch.ones(3, dtype=F64, device=device)
    factor, residuals = torch.eye(8, device=device), torch.randn(3, 6, 4, device=device)
    samples: dict[str, tuple[Any, ...]] = {
        "second_moment_": ([moment], [keys], None, None),
        "factor_product": (factor, white, False),
        "gram_solve": (white, ridge, None),
        "kv_solve": (white, residuals, ridge, factor, None),
    }
    for name, arguments in samples.items():
        torch.library.opcheck(getattr(ops, name), arguments)
    return [{"op": f"opcheck {name}", "error": 0.0, "limit": 0.0, "ok": True} for name in samples]


def sanitize(device: torch.device, small: bool) -> list[Row]:
    """A few launches of every kernel for compute-sanitizer to watch; the tool's exit status is the verdict."""
    keys = torch.randn(333, 137, device=device)
    for dtype in (BF16, torch.float16, torch.float32):
        for x in (keys.to(dtype), keys.to(dtype)[:, :136].contiguous()):
            for wide in (torch.float32, F64):
                moment = torch.zeros(x.shape[1], x.shape[1], dtype=wide, device=device)
                second_moment_(moment, x)
                second_moment_(moment, x, rows=torch.arange(0, 333, 2, device=device))
                second_moment_([moment, moment.clone()], [x, x], mask=torch.arange(333, device=device) % 3 > 0)
    for n in (1, 7, 64):
        white, ridge = torch.randn(5, 100, n, device=device), torch.ones(5, dtype=F64, device=device)
        torch.ops.kecore.gram_solve(white, ridge, None)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return [{"ops": list(OPS), "ok": True}]
