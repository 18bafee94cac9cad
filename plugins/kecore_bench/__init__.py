"""Benchmarks: methods x models x data sets into a store that survives a kill, and tables and pages over it.

    >>> from kecore_bench import BenchPlan, Store, results, run_plan, tables

Each name below loads when it is first used, so that ``kecore --help`` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kecore_bench.plan import BenchPlan
    from kecore_bench.processes import run_plan
    from kecore_bench.report import results, tables, write_report
    from kecore_bench.store import Store

_HOME = {
    "BenchPlan": "kecore_bench.plan",
    "Store": "kecore_bench.store",
    "results": "kecore_bench.report",
    "run_plan": "kecore_bench.processes",
    "tables": "kecore_bench.report",
    "write_report": "kecore_bench.report",
}

__all__ = ["BenchPlan", "Store", "results", "run_plan", "tables", "write_report"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
