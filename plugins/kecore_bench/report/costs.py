"""Costs of a run: the one list of them, with headings, meanings and units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kecore_bench.report.results import Result

__all__ = ["COSTS", "Cost"]


@dataclass(frozen=True)
class Cost:
    """A cost of a run; less is better.

    Args:
        key: its name in files, where it stands in seconds and bytes.
        heading: stands above its column.
        meaning: what it says.
        read: its value of a run in seconds or bytes; None where it is not known.
        unit: seconds or bytes of one unit of the heading.
        decimals: with how many it is written.
        signed: a plus is written before what is above zero.
        ranked: whether a table marks the least of it; not what is mostly noise.
    """

    key: str
    heading: str
    meaning: str
    read: Callable[[Result], float | None]
    unit: float = 1.0
    decimals: int = 2
    signed: bool = False
    ranked: bool = True

    def value(self, result: Result) -> float | None:
        """Return the cost of a run in the unit of the heading; None where it is not known."""
        value = self.read(result)
        return None if value is None else value / self.unit

    def text(self, result: Result) -> str | None:
        """Write the cost of a run; None where it is not known."""
        value = self.value(result)
        return None if value is None else self.write(value)

    def write(self, value: float) -> str:
        """Write a value in the unit of the heading."""
        return f"{value:+.{self.decimals}f}" if self.signed else f"{value:.{self.decimals}f}"


COSTS = (
    Cost(
        "seconds_per_fact", "s/fact",
        "seconds of editing for each fact, without loading, statistics and scoring",
        lambda result: result.seconds,
    ),
    Cost(
        "bytes_per_fact", "KiB/fact",
        "what the edits take to keep, over their facts; of a sequence those that act at its end",
        lambda result: result.bytes_per_fact, unit=2**10, decimals=1,
    ),
    Cost(
        "added_seconds_per_token", "+ms/token",
        "what the edits add to a token of greedy text; noise can make it negative",
        lambda result: result.latency["added"] if result.latency else None,
        unit=1e-3, decimals=1, signed=True, ranked=False,
    ),
    Cost(
        "peak_memory_bytes", "peak GiB",
        "most memory that the process held, with the model and the program; see the conditions",
        lambda result: result.peak_memory, unit=2**30,
    ),
)  # fmt: skip
"""What an edit costs, in the order of the columns."""
