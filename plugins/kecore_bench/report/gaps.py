"""Gaps of a table: scores that records have no value for, and records that were left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kecore.evaluate.columns import columns_of
from kecore.evaluate.metrics import Metric, metrics_of
from kecore.evaluate.records import Skipped
from kecore.evaluate.result import Evaluation
from kecore_bench.report.table import Row, Table, count_records

__all__ = ["Gap", "gap_notes", "gaps", "left_out"]

_UNCOMPARED = "no answers of the unedited model to compare with"


@dataclass(frozen=True)
class Gap:
    """Records that scores have no value for.

    Args:
        keys: the scores.
        lacks: what the records lack.
        methods: rows of which that is so; empty where it is so of all that take these scores.
        ids: the records; empty where all lack it.
        of: number of records that were scored; 0 where all lack it.
    """

    keys: tuple[str, ...]
    lacks: str
    methods: tuple[str, ...]
    ids: tuple[str, ...]
    of: int

    def sentence(self, names: Iterable[str]) -> str:
        """Return in words what is missing of the scores, which are called ``names``."""
        count = f"{len(self.ids)} of {self.of} records" if self.ids else "any record"
        whose = f" of {', '.join(self.methods)}" if self.methods else ""
        return f"{', '.join(names)}: not taken on {count}{whose}: {self.lacks}"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "scores": list(self.keys),
            "lacks": self.lacks,
            "methods": list(self.methods) or "all",
            "records": list(self.ids) or "all",
        }


@dataclass(frozen=True)
class _Lack:
    """A reason why some records of a run have no value.

    Args:
        reason: what they lack.
        ids: the records; empty where all lack it.
        of: number of records that were scored; 0 where all lack it.
    """

    reason: str
    ids: tuple[str, ...] = ()
    of: int = 0


def gaps(table: Table) -> list[Gap]:
    """Return all gaps of a table, in the order of its scores; those of the same records and reason are one."""
    metrics = metrics_of(table.first.protocol)
    takers: dict[str, list[str]] = defaultdict(list)  # labels of the rows that take a score, or lack it
    lackers: dict[str, dict[_Lack, list[str]]] = defaultdict(dict)  # by score, labels of the rows that lack so much
    for row in table.rows:
        if row.evaluation is None:
            continue
        missing = {**row.evaluation.missing, **_uncompared(row, row.evaluation, metrics)}
        for metric in metrics:
            if metric.key in missing or metric.applies(row.evaluation.protocol, row.evaluation.compared):
                takers[metric.key].append(row.label)
        for key, reasons in missing.items():
            for lack in _lacks(reasons, len(row.evaluation.rows)):
                lackers[key].setdefault(lack, []).append(row.label)
    keys_of_gap: dict[tuple[_Lack, tuple[str, ...]], list[str]] = defaultdict(list)
    for metric in metrics:
        for lack, labels in lackers[metric.key].items():
            methods = () if labels == takers[metric.key] else tuple(labels)
            keys_of_gap[lack, methods].append(metric.key)
    return [Gap(tuple(keys), lack.reason, methods, lack.ids, lack.of) for (lack, methods), keys in keys_of_gap.items()]


def _lacks(reasons: Mapping[str, str], size: int) -> list[_Lack]:
    """Return what records of a run lack, from the reason of each by its id; ``size`` records were scored."""
    lacks: list[_Lack] = []
    for reason in dict.fromkeys(reasons.values()):
        ids = tuple(id for id, of_record in reasons.items() if of_record == reason)
        lacks.append(_Lack(reason, ids, size) if len(ids) < size else _Lack(reason))
    return lacks


def _uncompared(row: Row, evaluation: Evaluation, metrics: Sequence[Metric]) -> dict[str, dict[str, str]]:
    """Return the scores of an edited model that need the unedited one, where that was not asked."""
    if evaluation.compared or not row.result.edits:
        return {}
    ids = [record.id for record in evaluation.rows]
    missing: dict[str, dict[str, str]] = {}
    for metric in metrics:
        if metric.applies(evaluation.protocol, True) and not metric.applies(evaluation.protocol, False):
            missing[metric.key] = dict.fromkeys(ids, _UNCOMPARED)
    return missing


def gap_notes(table: Table) -> list[str]:
    """Return the gaps of the scores that the main table shows or would show, in sentences."""
    columns = columns_of(table.first.protocol)
    notes: list[str] = []
    on_no_record: list[str] = []
    for gap in gaps(table):
        shown = [key for key in gap.keys if (columns[key].core if table.keys is None else key in table.keys)]
        headings = [columns[key].heading for key in shown]
        if not headings:
            continue
        if gap.ids or gap.methods:
            notes.append(gap.sentence(headings))
        else:
            on_no_record.append(f"{', '.join(headings)} ({gap.lacks})")
    if on_no_record:
        notes.append(f"not taken on any record: {'; '.join(on_no_record)}")
    skipped = left_out(table)
    if skipped:
        was = "was" if len(skipped) == 1 else "were"
        notes.append(
            f"{count_records(len(skipped))} of the file could not be represented and {was} left out; the first, "
            f"{skipped[0].where}: {skipped[0].reason}"
        )
    return notes


def left_out(table: Table) -> list[Skipped]:
    """Return place and reason of each record of the file that could not be represented."""
    skipped: list[Skipped] = []
    for row in table.rows:
        skipped += row.result.left_out
    return list(dict.fromkeys(skipped))
