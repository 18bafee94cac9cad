"""The native operations against the best that torch can do and against the statements that peers' code shares.

    make bench

Every competitor is compared with float64 before it is timed. The times of one run are written to ``out/bench.json``,
and ``benchmarks/report_ops.py`` makes ratios, tables and charts of them. On the CPU; ``gpu_check.sh`` measures GPUs.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from kecore.ops import loader
from kecore.ops.measure import Case, MomentCase, SolveCase, is_wrong

WIDTHS = (1536, 4096, 8192, 14336)
BATCHES = (1, 10, 100, 1000)
TOKENS = 2048
CASES: list[Case] = [
    *(MomentCase(d, TOKENS, dtype) for dtype in (torch.bfloat16, torch.float32) for d in WIDTHS),
    *(SolveCase(d, n) for n in BATCHES for d in WIDTHS),
    SolveCase(11008, 100),
]
SLOW = 2e11  # d³ beyond which a dense solve, of many seconds, runs once: its result is checked after it was timed


@lru_cache(maxsize=1)  # one case's matrices at a time: they are large
def prepared(case: Case) -> Case:
    # A new one: the cases above would keep what they have made.
    return type(case)(case.d, case.n, case.dtype) if isinstance(case, MomentCase) else SolveCase(case.d, case.n)


def name(case: Case) -> str:
    return f"{case.op}-{case.d}-{case.n}-{case.dtype}".replace("torch.", "")


@pytest.mark.parametrize("competitor", ["native", "torch", "peers"])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_ops(benchmark: pytest.FixtureRequest, case: Case, competitor: str) -> None:
    native = loader.active_backend()
    assert native.library is not None, native.reason
    here = prepared(case)
    run = here.competitors()[competitor]
    dense = case.op == "kv_solve" and competitor == "peers" and case.d**3 > SLOW
    error = here.error(benchmark.pedantic(run, rounds=1) if dense else run())  # a dense one only once, for its time
    assert not is_wrong(case.op, error / 10), f"relative error {error:.1e}"
    benchmark.group = name(case)
    benchmark.extra_info.update(
        op=case.op,
        d=case.d,
        n=case.n,
        dtype=str(case.dtype).removeprefix("torch."),
        competitor=competitor,
        error=error,
        threads=torch.get_num_threads(),
        backend=f"{native.kind}, {native.isa}",
    )
    if not dense:
        benchmark.pedantic(run, rounds=5)
