"""Which values of a column are the best, and which cannot be told from it: one rule for all tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeVar

from kecore.evaluate.result import Score

__all__ = ["LEGEND", "Mark", "mark_best"]

Mark = Literal["", "best", "near"]

LEGEND = (
    "Bold: the best value of a column among edited models, and what equals it as written; underlined: another value "
    "whose interval overlaps that of the best."
)
"""What marks mean, for readers of a table."""

Key = TypeVar("Key")


def mark_best(scores: Mapping[Key, Score], *, lower: bool, decimals: int) -> dict[Key, Mark]:
    """Return the marks of a column.

    Args:
        scores: the values of edited models, by whatever names their rows.
        lower: lower values are better.
        decimals: with how many decimals the column is written.

    Returns:
        By row ``best``, ``near`` where the interval overlaps that of the best value (which for means over seeds reaches
        from mean minus to mean plus the standard deviation), or an empty text. A single row has nothing to be better
        than, so it gets none.
    """
    marks: dict[Key, Mark] = dict.fromkeys(scores, "")
    if len(scores) < 2:
        return marks
    choose = min if lower else max
    best = choose(scores.values(), key=lambda score: score.value)
    for name, score in scores.items():
        if round(score.value, decimals) == round(best.value, decimals):
            marks[name] = "best"
        elif score.ends and best.ends and score.ends[0] <= best.ends[1] and best.ends[0] <= score.ends[1]:
            marks[name] = "near"
    return marks
