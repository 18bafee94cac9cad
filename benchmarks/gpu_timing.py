"""How fast is the native code on this device, and what does its promotion save? Phases of gpu_check.py."""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_correct import BF16, F64, Row, relative
from torch import Tensor

from kecore.ops import reference, second_moment_
from kecore.ops.measure import MomentCase, SolveCase

ROOT = Path(__file__).resolve().parent.parent


def seconds(run: Callable[[], Any], device: torch.device, *, repeats: int = 7) -> float:
    """Median time of one call after two that warm up, by CUDA events where there is a GPU."""
    times = []
    for i in range(repeats + 2):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            spent = begin.elapsed_time(end) / 1e3
        else:
            start = time.perf_counter()
            run()
            spent = time.perf_counter() - start
        if i >= 2:
            times.append(spent)
    return statistics.median(times)


def ceilings(device: torch.device, small: bool) -> list[Row]:
    """What this device reaches at all: bytes a second of a copy, multiplications and additions a second of products."""
    n = 256 if small else 8192
    rows: list[Row] = []
    a = torch.empty(n * n * (1 if small else 16), device=device)
    b = torch.empty_like(a)
    spent = seconds(lambda: b.copy_(a), device)
    rows.append({"what": "copy", "unit": "TB/s", "rate": 2 * a.numel() * 4 / spent / 1e12})
    for name, dtype, precision in (
        ("bf16", BF16, "ieee"),
        ("tf32", torch.float32, "tf32"),
        ("fp32", torch.float32, "ieee"),
        ("fp64", F64, "ieee"),
    ):
        torch.backends.cuda.matmul.fp32_precision = precision
        rows.append({"what": f"{name} product", "unit": "TFLOP/s", "rate": product_rate(n, dtype, device)})
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    return rows


def product_rate(n: int, dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s of torch's product of two square matrices."""
    x, y = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / seconds(lambda: x @ y, device) / 1e12


def moment(device: torch.device, small: bool) -> list[Row]:
    """Second moments of bfloat16 keys by native code, torch's best panels, one full product, and as peers do."""
    ceiling = product_rate(256 if small else 8192, BF16, device)
    sizes = (64, 200) if small else (1536, 4096, 8192, 14336, 28672)
    return [moment_row(MomentCase(d, 128 if small else 16384, BF16, str(device)), ceiling) for d in sizes]


def moment_row(case: MomentCase, ceiling: float) -> Row:
    x, d, device = case.keys, case.d, case.keys.device
    narrow, whole = (torch.zeros(d, d, device=device) for _ in range(2))

    def full() -> Tensor:
        return whole.add_(torch.mm(x.t(), x, out_dtype=torch.float32) if x.is_cuda else x.float().t() @ x.float())

    ways = case.competitors() | {"full": full, "native_f32": lambda: second_moment_(narrow, x)}
    row: Row = {"d": d, "tokens": case.n, "dtype": str(case.dtype)[6:]}
    row |= raced(ways, case.error, device)
    row["native_tflops"] = d * (d + 1) * case.n / row["native_s"] / 1e12  # of the triangle
    row["of_ceiling"] = row["native_tflops"] / ceiling
    row["of_torch"] = row["torch_s"] / row["native_s"]
    row["of_peers"] = row["peers_s"] / row["native_s"]
    row["ok"] = row["native_error"] < 3e-6
    return row


def raced(ways: dict[str, Callable[[], Tensor]], error: Callable[[Tensor], float], device: torch.device) -> Row:
    """Error of each way's first result, then its time."""
    row: Row = {}
    for name, way in ways.items():
        row[f"{name}_error"] = error(way())
        row[f"{name}_s"] = seconds(way, device, repeats=2 if name == "peers" else 7)
    return row


def many_layers(device: torch.device, small: bool) -> list[Row]:
    """What one launch for several small layers gains over one each."""
    d, tokens, layers = (64, 64, 2) if small else (1536, 16384, 8)
    keys = [torch.randn(tokens, d, device=device).to(BF16) for _ in range(layers)]
    moments = [torch.zeros(d, d, dtype=F64, device=device) for _ in keys]

    def one_by_one() -> None:
        for m, x in zip(moments, keys, strict=True):
            second_moment_(m, x)

    together = seconds(lambda: second_moment_(moments, keys), device)
    return [{"d": d, "layers": layers, "together_s": together, "one_by_one_s": seconds(one_by_one, device)}]


def solve(device: torch.device, small: bool) -> list[Row]:
    """Updates from a cached factor, by native code, the same formula in torch, and peers' LU of a d x d system."""
    sizes = [(48, 1), (48, 10)] if small else [(d, n) for d in (1536, 4096, 14336) for n in (1, 10, 100, 1000)]
    rows: list[Row] = []
    for d, n in sizes:
        case = SolveCase(d, n, str(device))
        row: Row = {"d": d, "n": n, **raced(case.competitors(), case.error, device)}
        row["of_torch"] = row["torch_s"] / row["native_s"]
        row["of_peers"] = row["peers_s"] / row["native_s"]
        rows.append(row | {"ok": row["native_error"] < 1e-4})
    return rows


def batched_solve(device: torch.device, small: bool) -> list[Row]:
    """Thousands of small systems in one launch, and by torch's batched factorisation."""
    shapes = [(4, 32, 2)] if small else [(4000, 1536, 1), (4000, 1536, 8), (512, 4096, 32), (64, 14336, 64)]
    return [batched_row(*shape, device) for shape in shapes]


def batched_row(batch: int, d: int, n: int, device: torch.device) -> Row:
    white, ridge = torch.randn(batch, d, n, device=device), torch.ones(batch, dtype=F64, device=device)
    found, expected = torch.ops.kecore.gram_solve(white, ridge, None), reference.gram_solve(white, ridge, None)
    error = relative(found[1], expected[1])
    native = seconds(lambda: torch.ops.kecore.gram_solve(white, ridge, None), device)
    in_torch = seconds(lambda: reference.gram_solve(white, ridge, None), device)
    row: Row = {"batch": batch, "d": d, "n": n, "error": error, "native_s": native, "torch_s": in_torch}
    return row | {"of_torch": in_torch / native, "ok": error < 1e-9}


# --- what the promotion is for ----------------------------------------------------------------------------------------


def truncation(device: torch.device, small: bool) -> list[Row]:
    """Mean relative error of the diagonal over a million tokens: as shipped, without promotion, and by cuBLAS."""
    d, tokens, calls = (16, 256, 2) if small else (1536, 1 << 20, 1)
    x = torch.randn(tokens, d, device=device).to(BF16)
    exact = torch.stack([part.double().square().sum(0) for part in x.split(1 << 16)]).sum(0)
    rows: list[Row] = []

    def add(name: str, diagonal: Tensor) -> None:
        off = (diagonal.double() - exact) / exact
        rows.append({"sum": name, "tokens": tokens, "mean": float(off.mean()), "worst": float(off.abs().max())})

    total = torch.zeros(d, d, dtype=F64, device=device)
    for part in x.split(tokens // calls):
        second_moment_(total, part)
    add("native, promoted", total.diagonal())
    if device.type == "cuda":
        add("native, never promoted", unpromoted(x).diagonal())
        add("one product, 16-bit", torch.mm(x.t(), x, out_dtype=torch.float32).diagonal())
    total = torch.zeros(d, d, device=device)
    for part in x.split(8192):
        total += part.float().t() @ part.float()
    add("peers, float32", total.diagonal())
    return rows


def unpromoted(x: Tensor) -> Tensor:
    """The moment by a copy of the kernel whose tensor-core sums run through; only for this measurement."""
    sys.path.insert(0, str(ROOT / "tests" / "csrc"))
    import mutants
    from no_driver import Layer

    folder = ROOT / "build" / "unpromoted"
    kernels = mutants.mutate(mutants.MUTANTS["never_promoted"], folder)
    major, minor = torch.cuda.get_device_capability(x.device)
    library = folder / "libunpromoted.so"
    flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC", f"-arch=sm_{major}{minor}", "-shared"]
    sources = [str(kernels / name) for name in ("second_moment.cu", "launch.cu")]
    subprocess.run(["nvcc", *flags, "-o", str(library), *sources], check=True)  # noqa: S607 - the one on PATH
    total = torch.zeros(x.shape[1], x.shape[1], dtype=F64, device=x.device)
    layer = Layer(x.data_ptr(), x.stride(0), len(x), x.shape[1], None, 0, None, total.data_ptr(), total.stride(0))
    stream = ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream)
    status = ctypes.CDLL(str(library)).ke_second_moment_cuda(ctypes.byref(layer), 1, 2, 3, stream)
    if status != 0:
        raise RuntimeError(f"the unpromoted kernel failed with status {status}")
    return total
