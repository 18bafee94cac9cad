"""Retention by age: how the facts of each stretch of a sequence score as it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kecore.evaluate.protocol import AT_END
from kecore.evaluate.result import Evaluation, Score
from kecore_bench.report.results import Result

__all__ = ["Aged", "age_rows", "aged"]


@dataclass(frozen=True, slots=True)
class Aged:
    """A score of the facts of one stretch, ``R(i, t)``.

    Args:
        begin: facts that were edited before the stretch.
        end: facts that were edited by its end.
        facts: facts that were edited when they were scored.
        score: their score then.
    """

    begin: int
    end: int
    facts: int
    score: Score


def aged(result: Result, key: str) -> list[Aged]:
    """Return a score of each stretch between two checkpoints, at its end and at all checkpoints after it.

    Args:
        result: a sequence; nothing is returned of what is none, and of moments that are not complete.
        key: the metric.
    """
    size, protocol = result.spec.size, result.protocol
    moments = {step * protocol.step: moment for step, moment in protocol.checkpoints(size).items()}
    moments[size] = AT_END
    ends = sorted(moments)
    scores: list[Aged] = []
    for facts, moment in sorted(moments.items()):
        evaluation = result.evaluations.get(moment)
        positions = protocol.drawn(facts)
        if evaluation is None or len(evaluation.rows) != len(positions):
            continue
        for begin, end in zip([0, *ends], ends, strict=False):
            pairs = zip(positions, evaluation.rows, strict=True)
            rows = tuple(row for position, row in pairs if begin <= position < end)
            if rows and end <= facts:
                stretch = Evaluation(protocol, rows).scores
                if key in stretch:
                    scores.append(Aged(begin, end, facts, stretch[key]))
    return scores


def age_rows(scores: Sequence[Aged]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of a table: a row a stretch, a column a moment; values with the facts they are of."""
    moments = sorted({score.facts for score in scores})
    rows: dict[tuple[int, int], dict[int, str]] = {}
    for score in scores:
        cell = f"{score.score.value:.3f} ({score.score.records})"
        rows.setdefault((score.begin, score.end), {})[score.facts] = cell
    table: list[list[str]] = []
    for (begin, end), cells in sorted(rows.items()):
        table.append([f"{begin + 1}-{end}", *(cells.get(moment, "-") for moment in moments)])
    return ["facts", *(f"after {moment}" for moment in moments)], table
