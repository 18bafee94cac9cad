"""Ten thousand synthetic keys through the solver: in one batch, and in a hundred batches one after another.

    python benchmarks/scale.py [--widths 1536,8192] [--keys 10000] [--batches 100] [--json]

Keys are drawn from a random second moment, residuals are Gaussian. What the one batch writes is compared with what the
dense system in float64 writes, on a sample of the keys; so is what a key for each of several contexts of every fact
writes (`--contexts`). Memory is the peak of the process over what it held before; a
batch in a sequence must not take more than the ones before it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bench_common import peak, reset_peak
from torch import Tensor

from kecore import KeyStatistics
from kecore.engine.accumulate import Past
from kecore.engine.keys import Keys
from kecore.engine.solve import least_squares
from kecore.memory import resident_bytes
from kecore.model import SiteId
from kecore.ops import Solution, kv_solve

CPU = torch.device("cpu")
RIDGE = 1e-4


def main() -> None:
    """Parse the command line and run."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--widths", default="1536")
    made.add_argument("--d-out", type=int, default=576)
    made.add_argument("--keys", type=int, default=10000)
    made.add_argument("--batches", type=int, default=100)
    made.add_argument("--weight", type=float, default=1500.0, help="λ, absolute")
    made.add_argument("--contexts", type=int, default=6, help="keys of a fact where every context has its own")
    made.add_argument("--accumulate", action="store_true", help="batches keep the keys of those before them in place")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--json", action="store_true")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    with TemporaryDirectory() as cache:
        os.environ["KECORE_CACHE"] = cache  # so that the factor is made, once
        widths(options)


def widths(options: argparse.Namespace) -> None:
    """Every width."""
    for width in map(int, options.widths.split(",")):
        found = run(width, options)
        sys.stdout.write((json.dumps(found) if options.json else text(found)) + "\n")
        sys.stdout.flush()


def run(d: int, options: argparse.Namespace) -> dict[str, Any]:
    """One width."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(d, d, generator=generator) / d**0.5
    # Coordinates of natural keys differ in size by orders of magnitude.
    mixing *= torch.logspace(0, -2, d)[None, :]
    sample = torch.randn(2 * d, d, generator=generator) @ mixing.t()
    moment = (sample.t() @ sample).double() / len(sample)
    del sample
    keys = mixing @ torch.randn(d, options.keys, generator=generator)
    residuals = torch.randn(options.d_out, options.keys, generator=generator)
    del mixing
    kv_solve(keys[:, :1], residuals[:, :1], 1.0)  # compiles or loads the native code
    statistics = KeyStatistics({SiteId(0): moment}, 2 * d, {}, "synthetic")
    begin = time.perf_counter()
    factor = statistics.factor(SiteId(0), RIDGE)
    factoring = time.perf_counter() - begin
    system = options.weight * moment
    system.diagonal().add_(options.weight * RIDGE * float(moment.diagonal().mean()))
    one = whole(factor, keys, residuals, options.weight, system)
    several = every_context(factor, keys, residuals, options, system)
    del system
    begin = time.perf_counter()
    KeyStatistics({SiteId(0): moment}, 2 * d, {}, "synthetic").factor(SiteId(0), RIDGE)
    mapping = time.perf_counter() - begin
    many = sequence(factor, keys, residuals, options, {} if options.accumulate else None)
    return {
        "d": d,
        "keys": options.keys,
        "factor_seconds": round(factoring, 3),
        "factor_again_seconds": round(mapping, 3),
        "matrix_bytes": 8 * d * d,
        "one_batch": one,
        "every_context": several,
        "batches": many,
    }


def whole(factor: Tensor, keys: Tensor, residuals: Tensor, weight: float, system: Tensor) -> dict[str, Any]:
    """All keys at once, compared with the dense system in float64."""
    reset_peak()
    before = resident_bytes(CPU)
    begin = time.perf_counter()
    solution = kv_solve(keys, residuals, weight, factor)
    seconds = time.perf_counter() - begin
    memory = peak() - before
    k = keys.double()
    error = difference(solution, system + k @ k.t(), residuals.double() @ k.t(), keys)
    return {"seconds": round(seconds, 3), "added_bytes": memory, "relative_error": error}


def every_context(
    factor: Tensor, keys: Tensor, residuals: Tensor, options: argparse.Namespace, system: Tensor
) -> dict[str, Any]:
    """All facts at once with a key for each context, as methods have them with `each_context`."""
    count, several = keys.shape[1], options.contexts
    noise = torch.Generator().manual_seed(1)
    rows = keys.t().repeat_interleave(several, 0)
    rows += 0.3 * rows.std() * torch.randn(rows.shape, generator=noise)
    place = torch.arange(len(rows))
    weight = torch.sparse_coo_tensor(
        torch.stack([place // several, place]),
        torch.full((len(rows),), 1 / several),
        (count, len(rows)),
        check_invariants=True,
    ).coalesce()
    reset_peak()
    before = resident_bytes(CPU)
    begin = time.perf_counter()
    found = Keys(rows, weight)
    solution = least_squares(found, residuals, factor, options.weight, absolute=True)
    seconds = time.perf_counter() - begin
    memory = peak() - before
    system = system.clone()
    for part in rows.split(8192):
        wide = part.double()
        system.addmm_(wide.t(), wide, alpha=1 / several)
    error = difference(solution, system, residuals.double() @ found.mean().double().t(), keys)
    return {"keys": len(rows), "seconds": round(seconds, 3), "added_bytes": memory, "relative_error": error}


def difference(solution: Solution, system: Tensor, given: Tensor, keys: Tensor) -> float:
    """How far an update is from `given @ system⁻¹`, on some keys."""
    some = keys[:, :50].double()
    wanted = given @ torch.linalg.solve(system, some)
    got = solution.U.double() @ (solution.V.double().t() @ some)
    error = float((got - wanted).norm() / wanted.norm())
    if not error < 1e-3:
        raise SystemExit(f"the update is wrong by {error:.1e}")
    return error


def sequence(
    factor: Tensor, keys: Tensor, residuals: Tensor, options: argparse.Namespace, state: dict[str, Tensor] | None
) -> dict[str, Any]:
    """Batches one after another, each kept as an edit's factors are; with a state, their keys as well."""
    size = options.keys // options.batches
    reset_peak()
    before = resident_bytes(CPU)
    kept: list[tuple[Tensor, Tensor]] = []
    added: list[int] = []
    own: list[int] = []
    seconds: list[float] = []
    for i in range(options.batches):
        reset_peak()
        here = resident_bytes(CPU)
        begin = time.perf_counter()
        part = slice(i * size, (i + 1) * size)
        columns = keys[:, part].contiguous()
        if state is not None:
            subjects = [str(j) for j in range(i * size, (i + 1) * size)]
            _, columns = Past(state, SiteId(0), subjects).joined(options.weight, columns, torch.arange(size))
        solution = kv_solve(columns, residuals[:, part].contiguous(), options.weight, factor)
        kept.append((solution.U, solution.V))
        seconds.append(time.perf_counter() - begin)
        added.append(peak() - here)
        own.append(4 * (solution.U.numel() + solution.V.numel() + (keys.shape[0] * size if state is not None else 0)))
    reset_peak()
    grown = resident_bytes(CPU) - before
    return {
        "seconds": round(sum(seconds), 3),
        "first_seconds": round(seconds[0], 4),
        "last_seconds": round(seconds[-1], 4),
        "added_bytes_first": added[0],
        "added_bytes_last": added[-1],
        "added_bytes_most": max(added),
        "edit_bytes": own[0],
        "grown_bytes": grown,
        "all_edits_bytes": sum(own),
    }


def text(found: dict[str, Any]) -> str:
    """A width for people."""
    one, several, many, unit = found["one_batch"], found["every_context"], found["batches"], 2**20
    parts = [
        f"d = {found['d']} (a float64 matrix is {found['matrix_bytes'] / unit:.0f} MiB): "
        f"factor {found['factor_seconds']} s, from the cache {found['factor_again_seconds']} s",
        f"{found['keys']} keys at once {one['seconds']} s, {one['added_bytes'] / unit:.0f} MiB, "
        f"error {one['relative_error']:.1e}",
        f"with {several['keys']} keys {several['seconds']} s, {several['added_bytes'] / unit:.0f} MiB, "
        f"error {several['relative_error']:.1e}",
        f"in batches {many['seconds']} s, {many['added_bytes_first'] / unit:.0f} MiB for the first, "
        f"{many['added_bytes_last'] / unit:.0f} MiB for the last",
        f"{many['grown_bytes'] / unit:.0f} MiB kept for {many['all_edits_bytes'] / unit:.0f} MiB of edits",
    ]
    return "; ".join(parts)


if __name__ == "__main__":
    main()
