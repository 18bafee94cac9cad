"""What a run cost and what it ran on: time, memory, hardware and versions, as results record them."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from kecore._version import __version__
from kecore.cli.console import Screen, fields, seconds, size, table

if TYPE_CHECKING:
    from kecore.memory import MemoryPlan, Need

__all__ = ["cost", "environment", "hardware", "plan_table", "show_cost"]


def hardware(device: Any) -> dict[str, Any]:
    """The machine, as results record it."""
    import torch

    values = {
        "device": str(device),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        values["accelerator"] = torch.cuda.get_device_name(device)
    return values


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def environment(device: Any) -> dict[str, Any]:
    """Versions and hardware: what a number needs beside its protocol."""
    import torch
    import transformers

    versions = {
        "kecore": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {"versions": versions, "hardware": hardware(device)}


def cost(screen: Screen, device: Any, stages: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Stage times and memory of the command so far; ``stages`` instead of the screen's own."""
    import torch

    from kecore.memory import peak

    return {
        "stages": dict(screen.stages if stages is None else stages),
        "total_seconds": screen.elapsed,
        "peak_memory_bytes": peak(device),
        "peak_host_memory_bytes": peak(torch.device("cpu")),
    }


def plan_table(plans: Sequence[MemoryPlan]) -> Table:
    """What stages are expected to take in memory, and how they keep within the budget."""
    first = plans[0]
    there = ", ".join(f"{name} {size(count)}" for name, count in first.held.items())
    limit = "no limit known" if first.budget is None else f"budget {size(first.budget)}"
    return table(
        "stage",
        "holds",
        "micro-batch",
        "at the peak",
        rows=[
            [need.stage, _holds(need), _batches(plan, need), size(plan.peak(need))]
            for plan in plans
            for need in plan.needs
        ],
        title=f"Memory: {limit}; there already: {there}",
        right=(3,),
    )


def _holds(need: Need) -> str:
    """The largest parts in words; the rest together."""
    ordered = sorted(need.parts.items(), key=lambda part: -part[1])
    shown = [
        f"{name} {size(count)}{' from disk' if name in need.mapped else ''}" for name, count in ordered[:3] if count
    ]
    rest = sum(count for _, count in ordered[3:])
    return ", ".join([*shown, *([f"other {size(rest)}"] if rest else [])]) or "-"


def _batches(plan: MemoryPlan, need: Need) -> str:
    tokens = need.micro_batch(plan.activations)
    return f"{tokens:,} of {need.tokens:,} tokens, {size(need.token * tokens)}" if tokens else "-"


def show_cost(screen: Screen, values: Mapping[str, Any]) -> None:
    """Print what :func:`cost` gave."""
    parts = ", ".join(f"{name} {seconds(value)}" for name, value in values["stages"].items())
    time, memory = seconds(values["total_seconds"]), size(values["peak_memory_bytes"])
    screen.show(fields({"time": f"{time} in all: {parts}", "memory": f"{memory} at the peak"}))
