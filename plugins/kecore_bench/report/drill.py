"""What became of each record: the data that the page's script shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kecore.api.types import NamesAll, ProbeKind
from kecore.evaluate.answers import AnsweredProbe, RecordResult
from kecore.evaluate.measuring import outcomes
from kecore.evaluate.metrics import UNIT, Metric, free_generation, log_probability, magnitude, metrics_of
from kecore.evaluate.result import Evaluation
from kecore_bench.report.figures import colour
from kecore_bench.report.results import Table

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
        return next((metric for metric in shares if metric.core), shares[0] if shares else None)

    def to_json(self) -> dict[str, Any]:
        """What the page shows of it."""
        text = next((i for i, metric in enumerate(self.metrics) if metric.measure is free_generation), None)
        return {
            "letter": LETTERS[self.kind],
            "name": self.kind.replace("_", "-"),
            "mark": self.mark and (self.mark.heading or self.mark.name),
            "meaning": self.mark and self.mark.meaning,
            "metrics": [
                [metric.heading or metric.name, metric.meaning, metric.bounds == UNIT] for metric in self.metrics
            ],
            "text": text,
        }


def drill(table: Table) -> dict[str, Any]:
    """Every record of a table with the answers of every method.

    Returns:
        ``title``; ``methods`` with label and colour; ``before``, the place of the unedited model among them;
        ``probability``, what P of an answer is; ``kinds`` of probes with the metrics that marks and columns come from;
        ``records``, each with ``id``, ``prompt``, ``target``, ``probes`` (kind, axis, prompt, answers, whether they
        count) and, by method, ``answers`` in the same order (see :func:`_answer`) and ``marks`` by kind (tests that are
        right, or None where values are fractions; number of tests; the record's value).
    """
    rows = [(row, row.evaluation) for row in table.rows if row.evaluation]
    answered = [{record.id: record for record in evaluation.rows} for _, evaluation in rows]
    kinds = _kinds(table)
    every = {id: record for found in answered for id, record in found.items()}
    evaluations = [evaluation for _, evaluation in rows]
    return {
        "title": table.title,
        "methods": [{"label": row.label, "colour": colour(table, row.label)} for row, _ in rows],
        "before": next((i for i, (row, _) in enumerate(rows) if not row.result.edits), None),
        "probability": "per token" if table.first.protocol.probability == "mean" else "of the whole answer",
        "kinds": {name: kind.to_json() for name, kind in kinds.items()},
        "records": [
            _record(record, [found.get(id) for found in answered], evaluations, kinds) for id, record in every.items()
        ],
    }


def _kinds(table: Table) -> dict[str, _Kind]:
    """The kinds that have probes, in the order of :data:`LETTERS`."""
    found = {key for row in table.rows for key in row.scores}
    there = {probe.kind for row in _evaluated(table) for record in row.rows for probe in record.probes}
    metrics = [metric for metric in metrics_of(table.first.protocol) if metric.measure is not magnitude]
    return {
        kind: _Kind(kind, [metric for metric in metrics if metric.kind == kind and metric.key in found])
        for kind in LETTERS
        if kind in there
    }


def _evaluated(table: Table) -> list[Evaluation]:
    return [row.evaluation for row in table.rows if row.evaluation]


def _record(
    record: RecordResult,
    answered: Sequence[RecordResult | None],
    evaluations: Sequence[Evaluation],
    kinds: Mapping[str, _Kind],
) -> dict[str, Any]:
    edit = next((probe for probe in record.probes if probe.kind == "edit"), None)
    pairs = list(zip(answered, evaluations, strict=True))
    # Conditions are those of the unedited model, which a comparison takes over.
    counts = next((found for found, evaluation in pairs if found and evaluation.compared), record)
    return {
        "id": record.id,
        "prompt": edit.prompt if edit else "",
        "target": edit.answers[0] if edit and edit.answers else "",
        "probes": [
            [probe.kind, probe.probe.axis.replace("_", " "), probe.prompt, _wanted(probe), known.holds is not False]
            for probe, known in zip(record.probes, counts.probes, strict=True)
        ],
        "answers": [found and [_answer(probe, kinds[probe.kind], e) for probe in found.probes] for found, e in pairs],
        "marks": [found and _marks(found, kinds, evaluation) for found, evaluation in pairs],
    }


def _wanted(probe: AnsweredProbe) -> str:
    """What is right, in a line: spellings of one thing, and further things."""
    rule = probe.probe.rule
    others = rule.others if isinstance(rule, NamesAll) else ()
    return " and ".join(" / ".join(spellings) for spellings in (probe.answers, *others) if spellings)


def _answer(probe: AnsweredProbe, kind: _Kind, evaluation: Evaluation) -> list[Any]:
    """Values of the kind's metrics, P of the first spelling and of its rival, and the text."""
    protocol = evaluation.protocol
    values = [
        metric.value(probe, protocol) if metric.applies(protocol, evaluation.compared) else None
        for metric in kind.metrics
    ]
    chances = [probe.scores[0] if probe.scores else None, probe.rival]
    shown = [None if score is None else _short(math.exp(log_probability(score, protocol))) for score in chances]
    return [[None if value is None else _short(value) for value in values], *shown, probe.text]


def _marks(record: RecordResult, kinds: Mapping[str, _Kind], evaluation: Evaluation) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for name, kind in kinds.items():
        if kind.mark is None or not kind.mark.applies(evaluation.protocol, evaluation.compared):
            continue
        if made := outcomes(kind.mark, record.probes, evaluation.protocol):
            whole = all(value in (0, 1) for value in made.tests)
            found[name] = [int(sum(made.tests)) if whole else None, len(made.tests), _short(made.value)]
    return found


def _short(value: float) -> float:
    """A number to four digits, which is what the page shows."""
    return float(f"{value:.4g}")
