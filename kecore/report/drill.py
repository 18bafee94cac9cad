"""What became of each record: the data that the page's script shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kecore.evaluate.metrics import AnsweredProbe
from kecore.evaluate.result import RecordResult
from kecore.report.figures import colour
from kecore.report.results import Row, Table

__all__ = ["drill"]


def drill(table: Table) -> dict[str, Any]:
    """Every record of a table with the answers of every method.

    Returns:
        ``title``; ``methods`` with label and colour; ``records``, each with ``id``, ``prompt``, ``target``, ``old``,
        ``probes`` (kind, axis, prompt, answers) and, by method, ``answers`` in the same order (see :func:`_answer`).
    """
    rows = [row for row in table.rows if row.evaluation]
    answered: list[Mapping[str, RecordResult]] = [_by_id(row) for row in rows]
    every = {id: row for found in answered for id, row in found.items()}
    records = [_record(row, [found.get(id) for found in answered]) for id, row in every.items()]
    return {
        "title": table.title,
        "methods": [{"label": row.label, "colour": colour(table, row.label)} for row in rows],
        "before": next((i for i, row in enumerate(rows) if not row.result.edits), None),
        "records": records,
    }


def _by_id(row: Row) -> dict[str, RecordResult]:
    return {record.id: record for record in row.evaluation.rows} if row.evaluation else {}


def _record(row: RecordResult, answered: Sequence[RecordResult | None]) -> dict[str, Any]:
    edit = next((probe for probe in row.probes if probe.kind == "edit"), None)
    return {
        "id": row.id,
        "prompt": edit.prompt if edit else "",
        "target": edit.answers[0] if edit and edit.answers else "",
        "probes": [[probe.kind, probe.axis, probe.prompt, list(probe.answers)] for probe in row.probes],
        "answers": [None if found is None else [_answer(probe) for probe in found.probes] for found in answered],
    }


def _answer(probe: AnsweredProbe) -> list[Any]:
    """Right or not (None where that cannot be said), probability of the answer and of its rival, and the text."""
    right: bool | None = None
    if probe.scores and probe.rival is not None:
        right = probe.scores[0].mean > probe.rival.mean
    elif probe.scores:
        right = any(score.exact for score in probe.scores)
    chance = _short(max(score.mean for score in probe.scores)) if probe.scores else None
    return [right, chance, None if probe.rival is None else _short(probe.rival.mean), probe.text]


def _short(log: float) -> float:
    """A probability to four digits, which is what the page shows."""
    return float(f"{math.exp(log):.4g}")
