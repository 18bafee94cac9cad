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
    """Return score by metric, those that results always name first; None where nothing was evaluated."""
    if evaluation is None:
        return None
    values = {key: score.value for key, score in evaluation.scores.items()}
    return {key: values.get(key) for key in ALWAYS} | values


def score_values(evaluation: Evaluation | None) -> dict[str, Any] | None:
    """Return score by metric with its interval and counts; None where nothing was evaluated."""
    if evaluation is None:
        return None
    return {key: score.to_json() for key, score in evaluation.scores.items()}


def scores_table(before: Evaluation, after: Evaluation, title: str) -> Table:
    """Make a table of the scores that people read first."""
    from kecore.evaluate.columns import columns_of

    rows: list[tuple[str, ...]] = []
    for column in columns_of(after.protocol).values():
        score_before, score_after = before.scores.get(column.key), after.scores.get(column.key)
        if column.core and (score_before or score_after):
            rows.append((column.name, *_cells(score_before, score_after)))
    headers = ["", "before", "after", "95 % interval", "n", "probes"]
    if not any(row[3] for row in rows):  # as for a single record
        rows = [row[:3] + row[4:] for row in rows]
        headers = headers[:3] + headers[4:]
    return make_table(*headers, rows=rows, title=title, right=range(1, len(headers)))


def _cells(before: Score | None, after: Score | None) -> tuple[str, str, str, str, str]:
    """Write one metric: before, after, interval, records and probes."""
    score = after or before
    ends = after.ends if after is not None else None
    return (
        format_score(before.value if before else None),
        format_score(after.value if after else None),
        f"{format_score(ends[0])} to {format_score(ends[1])}" if ends else "",
        str(score.records) if score else "",
        str(score.probes) if score else "",
    )
