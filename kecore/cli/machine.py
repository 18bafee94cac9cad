"""Says what a command costs in time and memory, for programs and for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from rich.table import Table

from kecore.cli.console import Screen, format_bytes, format_seconds, make_fields, make_table

if TYPE_CHECKING:
    from kecore.memory import MemoryPlan, Need

__all__ = ["measure_cost", "plan_table", "show_cost", "show_plans"]

_TIGHT = 0.8  # share of the budget from which a peak is worth a table


def measure_cost(screen: Screen, device: Any, edit_stages: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Return stage times and memory of the command so far, as JSON values.

    Args:
        screen: has timed the stages.
        device: whose memory is measured.
        edit_stages: the method's own stages, which take the place of the stage ``edit``.
    """
    import torch

    from kecore.memory import peak_bytes

    stages: dict[str, float] = {}
    for name, seconds in screen.stages.items():
        if name == "edit" and edit_stages is not None:
            stages |= edit_stages
        else:
            stages[name] = seconds
    return {
        "stages": stages,
        "total_seconds": screen.elapsed,
        "peak_memory_bytes": peak_bytes(device),
        "peak_host_memory_bytes": peak_bytes(torch.device("cpu")),
    }


def show_plans(screen: Screen, plans: Sequence[MemoryPlan], *, asked: bool) -> None:
    """Say on stderr what stages are expected to take: a table where it was asked for or memory is tight, else a line.

    Args:
        screen: shows it.
        plans: of the stages.
        asked: the user set a budget.
    """
    peak = max(plan.peak(need) for plan in plans for need in plan.needs)
    budget = plans[0].budget
    if asked or (budget is not None and peak > _TIGHT * budget):
        screen.err.print(plan_table(plans))
        return
    limit = "" if budget is None else f" of {format_bytes(budget)} that may be taken"
    screen.log(f"memory: {format_bytes(peak)} at the peak expected{limit}")


def plan_table(plans: Sequence[MemoryPlan]) -> Table:
    """Make a table of what stages are expected to take in memory, and how they keep within the budget."""
    first = plans[0]
    already = ", ".join(f"{name} {format_bytes(count)}" for name, count in first.held.items())
    limit = "no limit known" if first.budget is None else f"budget {format_bytes(first.budget)}"
    rows: list[list[str]] = []
    for plan in plans:
        for need in plan.needs:
            rows.append([need.stage, _describe_parts(need), _describe_batch(plan, need), format_bytes(plan.peak(need))])
    title = f"Memory: {limit}; there already: {already}"
    return make_table("stage", "holds", "micro-batch", "at the peak", rows=rows, title=title, right=(3,))


def _describe_parts(need: Need) -> str:
    """Name the three largest parts of what a stage holds; the others together."""
    ordered = sorted(need.parts.items(), key=itemgetter(1), reverse=True)
    words: list[str] = []
    for name, count in ordered[:3]:
        if count:
            origin = " from disk" if name in need.mapped else ""
            words.append(f"{name} {format_bytes(count)}{origin}")
    remainder = sum(count for _, count in ordered[3:])
    if remainder:
        words.append(f"other {format_bytes(remainder)}")
    return ", ".join(words) or "-"


def _describe_batch(plan: MemoryPlan, need: Need) -> str:
    tokens = need.micro_batch(plan.activations)
    if not tokens:
        return "-"
    return f"{tokens:,} of {need.tokens:,} tokens, {format_bytes(need.token * tokens)}"


def show_cost(screen: Screen, values: Mapping[str, Any]) -> None:
    """Print what :func:`measure_cost` gave."""
    stages = ", ".join(f"{name} {format_seconds(value)}" for name, value in values["stages"].items())
    time, memory = format_seconds(values["total_seconds"]), format_bytes(values["peak_memory_bytes"])
    screen.show(make_fields({"time": f"{time} in all: {stages}", "memory": f"{memory} at the peak"}))
