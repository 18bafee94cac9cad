"""Scores before and after an edit, for programs and for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from kecore.cli.console import number, table

if TYPE_CHECKING:
    from kecore.evaluate import Evaluation, Score

__all__ = ["flat", "score_values", "scores_table"]

ALWAYS = ("edit_success", "paraphrase_success", "neighbourhood_success", "strict_accuracy", "free_generation")
"""Scores that results always name; null where no record has what they need."""

_LABELS = {
    "edit_success": "edit success (ES)",
    "paraphrase_success": "paraphrase success (PS)",
    "neighbourhood_success": "neighbourhood success (NS)",
    "score": "score, harmonic mean of the three",
    "strict_accuracy": "strict accuracy, edit",
    "paraphrase_strict_accuracy": "strict accuracy, paraphrase",
    "free_generation": "free generation, edit",
    "paraphrase_free_generation": "free generation, paraphrase",
    "portability": "portability",
    "locality": "locality",
    "neighbourhood_stability": "neighbourhood stability",
}


def flat(evaluation: Evaluation | None) -> dict[str, float | None] | None:
    """Score by metric; None where nothing was evaluated."""
    if evaluation is None:
        return None
    found = {key: score.value for key, score in evaluation.scores.items()}
    return {**{key: found.get(key) for key in ALWAYS}, **found}


def score_values(evaluation: Evaluation | None) -> dict[str, Any] | None:
    """Score by metric with half-width and counts; None where nothing was evaluated."""
    if evaluation is None:
        return None
    return {key: score.to_json() for key, score in evaluation.scores.items()}


def scores_table(before: Evaluation, after: Evaluation, title: str) -> Table:
    """The scores that people read first."""
    keys = [key for key in _LABELS if key in after.scores or key in before.scores]
    rows = [(_LABELS[key], *_row(before.scores.get(key), after.scores.get(key))) for key in keys]
    headers = ["", "before", "after", "± (95 %)", "n", "probes"]
    if not any(row[3] for row in rows):  # as for a single record
        rows, headers = [row[:3] + row[4:] for row in rows], headers[:3] + headers[4:]
    return table(*headers, rows=rows, title=title, right=range(1, len(headers)))


def _row(before: Score | None, after: Score | None) -> tuple[str, str, str, str, str]:
    known = after or before
    half = after.half_width if after is not None else None
    return (
        number(before.value if before else None),
        number(after.value if after else None),
        number(half) if half else "",  # zero only says that all records are alike
        str(known.records) if known else "",
        str(known.probes) if known else "",
    )
