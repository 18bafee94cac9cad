"""What changes as a sequence of edits grows: held-out text, seconds and bytes, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kecore.evaluate.held_out import Drift
from kecore_bench.report.results import Result

__all__ = ["HEADS", "Growth", "GrowthLine", "growth_lines", "growth_rows"]

HEADS = ("method", "facts", "perplexity", "x base", "same next word", "s/fact", "KiB/fact", "state MiB")
"""Headings of :func:`growth_rows`."""

_SHOWN = 10
"""Most rows of the table for a method."""


@dataclass(frozen=True, slots=True)
class Growth:
    """A sequence after one of its steps.

    Args:
        facts: facts edited so far.
        seconds: of editing for each fact of this step.
        edit_bytes: of the edits that act, for each fact so far.
        state_bytes: of what the method remembers for its next edit; None in stores of before it was kept.
        drift: how far held-out text is from the unedited model; None where it was not read at this step.
    """

    facts: int
    seconds: float
    edit_bytes: float
    state_bytes: int | None
    drift: Drift | None


@dataclass(frozen=True, slots=True)
class GrowthLine:
    """A method's sequence.

    Args:
        label: the method.
        points: its steps, in order.
    """

    label: str
    points: Sequence[Growth]


def growth_lines(results: Sequence[Result]) -> list[GrowthLine]:
    """Return the steps of each sequence; of several seeds the first, and none of what has a single step."""
    lines: dict[str, GrowthLine] = {}
    for result in results:
        points = _points(result)
        if len(points) > 1 and result.label not in lines:
            lines[result.label] = GrowthLine(result.label, points)
    return list(lines.values())


def growth_rows(lines: Sequence[GrowthLine]) -> list[list[str]]:
    """Return the rows of a table with the columns :data:`HEADS`: the steps at which text was read, else some."""
    rows: list[list[str]] = []
    for line in lines:
        points = [point for point in line.points if point.drift is not None]
        if not points:
            stride = -(-len(line.points) // _SHOWN)
            points = line.points[::-1][::stride][::-1]  # the last step is among them
        rows += [_row(line.label, point) for point in points]
    return rows


def _points(result: Result) -> list[Growth]:
    points: list[Growth] = []
    facts, size = 0, 0
    for part, cost in result.costs.items():
        if not part.startswith("step-") or "supersedes" not in cost:
            return []
        facts += cost["records"]
        if cost["supersedes"]:
            size = 0  # the edit holds what the earlier ones of its sequence hold
        size += cost["edit_bytes"]
        drift = Drift.from_json(cost["held_out"]) if "held_out" in cost else None
        points.append(Growth(facts, cost["seconds"] / cost["records"], size / facts, cost.get("state_bytes"), drift))
    return points


def _row(label: str, point: Growth) -> list[str]:
    perplexity = ratio = agreement = "-"
    if point.drift is not None:
        drift = point.drift
        perplexity, ratio = f"{drift.perplexity:.2f}", f"{drift.perplexity_ratio:.3f}"
        agreement = f"{drift.agreement:.3f} [{drift.low:.3f}, {drift.high:.3f}]"
    state = "-" if point.state_bytes is None else f"{point.state_bytes / 2**20:.1f}"
    return [
        label, str(point.facts), perplexity, ratio, agreement, f"{point.seconds:.2f}", f"{point.edit_bytes / 1024:.1f}",
        state,
    ]  # fmt: skip
