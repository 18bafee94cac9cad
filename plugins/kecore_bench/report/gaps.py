"""What a table could not be taken on: scores that records have no value for, and records that were left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kecore.evaluate.columns import columns_of
from kecore.evaluate.metrics import Metric, metrics_of
from kecore.evaluate.result import Evaluation
from kecore_bench.report.results import Row, Table

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
        """What is missing, in words, of scores called so."""
        count = f"{len(self.ids)} of {self.of} records" if self.ids else "any record"
        whose = f" of {', '.join(self.methods)}" if self.methods else ""
        return f"{', '.join(names)}: not taken on {count}{whose}: {self.lacks}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        every = {"methods": list(self.methods) or "all", "records": list(self.ids) or "all"}
        return {"scores": list(self.keys), "lacks": self.lacks, **every}


def gaps(table: Table) -> list[Gap]:
    """All gaps of a table, in the order of its scores; those of the same records and reason are one."""
    metrics = metrics_of(table.first.protocol)
    found: dict[tuple[str, str, tuple[str, ...], int], list[str]] = {}
    taken: dict[str, list[str]] = {}
    for row in table.rows:
        if row.evaluation is None:
            continue
        missing = {**row.evaluation.missing, **_uncompared(row, row.evaluation, metrics)}
        for metric in metrics:
            if metric.key in missing or metric.applies(row.evaluation.protocol, row.evaluation.compared):
                taken.setdefault(metric.key, []).append(row.label)
        size = len(row.evaluation.rows)
        for key, reasons in missing.items():
            for lacks in dict.fromkeys(reasons.values()):
                ids = tuple(id for id, reason in reasons.items() if reason == lacks)
                place = (key, lacks, ids, size) if len(ids) < size else (key, lacks, (), 0)
                found.setdefault(place, []).append(row.label)
    grouped: dict[tuple[str, tuple[str, ...], tuple[str, ...], int], list[str]] = {}
    for key in [metric.key for metric in metrics]:
        for (missing_key, lacks, ids, of), labels in found.items():
            if missing_key == key:
                methods = () if labels == taken[key] else tuple(labels)
                grouped.setdefault((lacks, methods, ids, of), []).append(key)
    return [Gap(tuple(keys), lacks, methods, ids, of) for (lacks, methods, ids, of), keys in grouped.items()]


def _uncompared(row: Row, evaluation: Evaluation, metrics: Sequence[Metric]) -> Mapping[str, Mapping[str, str]]:
    """Scores of an edited model that need the unedited one, where that was not asked."""
    if evaluation.compared or not row.result.edits:
        return {}
    protocol, ids = evaluation.protocol, [record.id for record in evaluation.rows]
    needed = [m.key for m in metrics if m.applies(protocol, True) and not m.applies(protocol, False)]
    return {key: dict.fromkeys(ids, _UNCOMPARED) for key in needed}


def gap_notes(table: Table) -> list[str]:
    """The gaps of the scores that the main table shows or would show, in sentences."""
    columns = columns_of(table.first.protocol)
    named = [(gap, [columns[key].heading for key in gap.keys if columns[key].core]) for gap in gaps(table)]
    named = [(gap, names) for gap, names in named if names]
    found = [gap.sentence(names) for gap, names in named if gap.ids or gap.methods]
    if whole := [f"{', '.join(names)} ({gap.lacks})" for gap, names in named if not (gap.ids or gap.methods)]:
        found.append(f"not taken on any record: {'; '.join(whole)}")
    if skipped := left_out(table):
        where, why = skipped[0]
        count = f"{len(skipped)} record{'' if len(skipped) == 1 else 's'} of the file could not be represented and "
        found.append(f"{count}{'was' if len(skipped) == 1 else 'were'} left out; the first, {where}: {why}")
    return found


def left_out(table: Table) -> list[tuple[str, str]]:
    """Place and reason of each record of the file that could not be represented."""
    found = dict.fromkeys(item for row in table.rows for item in row.result.left_out)
    return list(found)
