"""Scores before and after an edit, for programs and for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from kecore.cli.console import format_score, make_table

if TYPE_CHECKING:
    from kecore.evaluate import Evaluation, Score

__all__ = ["flatten_scores", "score_values", "scores_table"]

ALWAYS = ("edit_success", "paraphrase_success", "neighbourhood_success", "strict_accuracy", "free_generation")
"""Scores that results always name; null where no record has what they need."""


def flatten_scores(evaluation: Evaluation | None) -> dict[str, float | None] | None:
    """Score by metric; None where nothing was evaluated."""
    if evaluation is None:
        return None
    found = {key: score.value for key, score in evaluation.scores.items()}
    return {**{key: found.get(key) for key in ALWAYS}, **found}


def score_values(evaluation: Evaluation | None) -> dict[str, Any] | None:
    """Score by metric with its interval and counts; None where nothing was evaluated."""
    if evaluation is None:
        return None
    return {key: score.to_json() for key, score in evaluation.scores.items()}


def scores_table(before: Evaluation, after: Evaluation, title: str) -> Table:
    """The scores that people read first."""
    from kecore.evaluate.columns import columns_of

    columns = [column for column in columns_of(after.protocol).values() if column.core]
    pairs = [(column, before.scores.get(column.key), after.scores.get(column.key)) for column in columns]
    rows = [(column.name, *_row(*scores)) for column, *scores in pairs if any(scores)]
    headers = ["", "before", "after", "95 % interval", "n", "probes"]
    if not any(row[3] for row in rows):  # as for a single record
        rows, headers = [row[:3] + row[4:] for row in rows], headers[:3] + headers[4:]
    return make_table(*headers, rows=rows, title=title, right=range(1, len(headers)))


def _row(before: Score | None, after: Score | None) -> tuple[str, str, str, str, str]:
    known = after or before
    ends = after.ends if after is not None else None
    return (
        format_score(before.value if before else None),
        format_score(after.value if after else None),
        f"{format_score(ends[0])} to {format_score(ends[1])}" if ends else "",
        str(known.records) if known else "",
        str(known.probes) if known else "",
    )
