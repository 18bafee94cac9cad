"""Answers and marks of each record: the data that the page's script shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kecore.api.types import NamesAll, ProbeKind
from kecore.evaluate.answers import AnsweredProbe, RecordResult
from kecore.evaluate.measuring import outcomes
from kecore.evaluate.metrics import UNIT, Metric, free_generation, log_probability, metrics_of
from kecore.evaluate.protocol import Protocol
from kecore.evaluate.result import Evaluation
from kecore.inference.scoring import ContinuationScore
from kecore_bench.report.figures import colour
from kecore_bench.report.table import Row, Table
from kecore_metrics.standard import magnitude

__all__ = ["LETTERS", "drill"]

LETTERS: Mapping[ProbeKind, str] = {
    "edit": "E", "paraphrase": "P", "neighbourhood": "N", "locality": "L", "portability": "R", "multi_hop": "M",
    "hop": "H", "generation": "G",
}  # fmt: skip
"""What marks of a kind of probes begin with."""


@dataclass(frozen=True)
class _Kind:
    """A kind of probes of a table.

    Args:
        kind: its name.
        metrics: what the protocol takes on it, of which some row has a value; but not magnitudes, which are the
            difference of two columns that stand there.
    """

    kind: ProbeKind
    metrics: Sequence[Metric]

    @cached_property
    def mark(self) -> Metric | None:
        """The metric that marks come from: the first share of the main table, or else of all."""
        shares = [metric for metric in self.metrics if metric.bounds == UNIT]
        for metric in shares:
            if metric.core:
                return metric
        return shares[0] if shares else None

    def to_json(self) -> dict[str, Any]:
        """Return what the page shows of it; ``text`` is the index of the metric that judges free text."""
        values: dict[str, Any] = {
            "letter": LETTERS[self.kind],
            "name": self.kind.replace("_", "-"),
            "mark": None,
            "meaning": None,
            "metrics": [[_heading(metric), metric.meaning, metric.bounds == UNIT] for metric in self.metrics],
            "text": None,
        }
        if self.mark is not None:
            values |= {"mark": _heading(self.mark), "meaning": self.mark.meaning}
        for index, metric in enumerate(self.metrics):
            if metric.measure is free_generation:
                values["text"] = index
                break
        return values


def _heading(metric: Metric) -> str:
    return metric.heading or metric.name


def drill(table: Table) -> dict[str, Any]:
    """Return every record of a table with the answers of every method.

    Returns:
        ``title``; ``methods`` with label and colour; ``before``, the place of the unedited model among them;
        ``probability``, what P of an answer is; ``kinds`` of probes with the metrics that marks and columns come from;
        ``records``, each with ``id``, ``prompt``, ``target``, ``probes`` (kind, axis, prompt, answers, whether they
        count) and, by method, ``answers`` in the same order (see :func:`_answer`) and ``marks`` by kind (tests that are
        right, or None where values are fractions; number of tests; the record's value).
    """
    kinds = _kinds(table)
    rows: list[Row] = []
    labels: list[dict[str, str]] = []
    methods: list[_Method] = []
    records: dict[str, RecordResult] = {}
    for row in table.rows:
        if row.evaluation:
            rows.append(row)
            labels.append({"label": row.label, "colour": colour(table, row.label)})
            answered = {record.id: record for record in row.evaluation.rows}
            methods.append(_Method(row.evaluation, answered))
            records |= answered
    kind_values = {name: kind.to_json() for name, kind in kinds.items()}
    record_values = [_record(record, methods, kinds) for record in records.values()]
    return {
        "title": table.title,
        "methods": labels,
        "before": _unedited_index(rows),
        "probability": "per token" if table.first.protocol.probability == "mean" else "of the whole answer",
        "kinds": kind_values,
        "records": record_values,
    }


@dataclass(frozen=True)
class _Method:
    """A method's answers to the records.

    Args:
        evaluation: its scores.
        records: its answers by the record's id.
    """

    evaluation: Evaluation
    records: Mapping[str, RecordResult]


def _unedited_index(rows: Sequence[Row]) -> int | None:
    """Return which row is the unedited model; None where none is."""
    for index, row in enumerate(rows):
        if not row.result.edits:
            return index
    return None


def _kinds(table: Table) -> dict[str, _Kind]:
    """Return the kinds that have probes, in the order of :data:`LETTERS`."""
    scored_keys: set[str] = set()
    kinds_with_probes: set[str] = set()
    for row in table.rows:
        scored_keys |= row.scores.keys()
        for record in row.evaluation.rows if row.evaluation else ():
            kinds_with_probes |= {probe.kind for probe in record.probes}
    metrics = [metric for metric in metrics_of(table.first.protocol) if metric.measure is not magnitude]
    kinds: dict[str, _Kind] = {}
    for kind in LETTERS:
        if kind in kinds_with_probes:
            scored = [metric for metric in metrics if metric.kind == kind and metric.key in scored_keys]
            kinds[kind] = _Kind(kind, scored)
    return kinds


def _record(record: RecordResult, methods: Sequence[_Method], kinds: Mapping[str, _Kind]) -> dict[str, Any]:
    """Return a record with what each method answered; None for a method that was not asked."""
    answers: list[Any] = []
    marks: list[Any] = []
    for method in methods:
        answered = method.records.get(record.id)
        if answered is None:
            answers.append(None)
            marks.append(None)
            continue
        answers.append([_answer(probe, kinds[probe.kind], method.evaluation) for probe in answered.probes])
        marks.append(_marks(answered, kinds, method.evaluation))
    edits = [probe for probe in record.probes if probe.kind == "edit"]
    conditions = _conditions(record, methods)
    probes: list[list[Any]] = []
    for probe, condition in zip(record.probes, conditions.probes, strict=True):
        probes.append(_probe(probe, counts=condition.holds is not False))
    return {
        "id": record.id,
        "prompt": edits[0].prompt if edits else "",
        "target": edits[0].answers[0] if edits and edits[0].answers else "",
        "probes": probes,
        "answers": answers,
        "marks": marks,
    }


def _conditions(record: RecordResult, methods: Sequence[_Method]) -> RecordResult:
    """Return the record that says which probes count: as the unedited model answered it, if a run was compared."""
    for method in methods:
        if method.evaluation.compared and record.id in method.records:
            return method.records[record.id]
    return record


def _probe(probe: AnsweredProbe, *, counts: bool) -> list[Any]:
    return [probe.kind, probe.probe.axis.replace("_", " "), probe.prompt, _right_answers(probe), counts]


def _right_answers(probe: AnsweredProbe) -> str:
    """Return what is right, in a line: spellings of one thing, and further things that are to be named."""
    things = [probe.answers]
    if isinstance(probe.probe.rule, NamesAll):
        things += probe.probe.rule.others
    return " and ".join(" / ".join(spellings) for spellings in things if spellings)


def _answer(probe: AnsweredProbe, kind: _Kind, evaluation: Evaluation) -> list[Any]:
    """Return the values of the kind's metrics, P of the first spelling and of its rival, and the text."""
    protocol = evaluation.protocol
    values: list[float | None] = []
    for metric in kind.metrics:
        value = metric.value(probe, protocol) if metric.applies(protocol, evaluation.compared) else None
        values.append(_shorten(value))
    first_spelling = probe.scores[0] if probe.scores else None
    return [values, _probability(first_spelling, protocol), _probability(probe.rival, protocol), probe.text]


def _probability(score: ContinuationScore | None, protocol: Protocol) -> float | None:
    return None if score is None else _shorten(math.exp(log_probability(score, protocol)))


def _marks(record: RecordResult, kinds: Mapping[str, _Kind], evaluation: Evaluation) -> dict[str, list[Any]]:
    """Return by kind the tests that are right (None where values are fractions), their number, and the mean."""
    marks: dict[str, list[Any]] = {}
    for name, kind in kinds.items():
        if kind.mark is None or not kind.mark.applies(evaluation.protocol, evaluation.compared):
            continue
        outcome = outcomes(kind.mark, record.probes, evaluation.protocol)
        if outcome:
            is_counted = all(value in (0, 1) for value in outcome.tests)
            right = int(sum(outcome.tests)) if is_counted else None
            marks[name] = [right, len(outcome.tests), _shorten(outcome.value)]
    return marks


def _shorten(value: float | None) -> float | None:
    """Return a number to four digits, which is what the page shows."""
    return None if value is None else float(f"{value:.4g}")
