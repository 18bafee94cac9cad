"""Says of each fact whether the model gives it after an edit."""

from __future__ import annotations

from dataclasses import dataclass

from kecore.evaluate.answers import AnsweredProbe, RecordResult
from kecore.evaluate.result import Evaluation

__all__ = ["Verdict", "row_verdicts", "verdicts_of"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the edited model gives a fact.

    Args:
        id: of the record.
        prompt: the edited prompt.
        target: what should follow.
        holds: every token of the target is the most probable one.
        written: what the model writes by itself; empty where it was not asked.
        right_tokens: tokens of the target that are the most probable ones.
        tokens: tokens of the target.
    """

    id: str
    prompt: str
    target: str
    holds: bool
    written: str
    right_tokens: int
    tokens: int


def verdicts_of(evaluation: Evaluation) -> list[Verdict]:
    """Return one verdict for each edited prompt of an evaluation, in order."""
    verdicts: list[Verdict] = []
    for row in evaluation.rows:
        verdicts += row_verdicts(row)
    return verdicts


def row_verdicts(row: RecordResult) -> list[Verdict]:
    """Return one verdict for each edited prompt of a record."""
    return [_verdict(row.id, probe) for probe in row.probes_of("edit") if probe.scores]


def _verdict(id: str, probe: AnsweredProbe) -> Verdict:
    score = max(probe.scores, key=lambda score: (score.exact, score.accuracy))  # of the target and its aliases
    return Verdict(
        id=id,
        prompt=probe.prompt,
        target=probe.answers[0],
        holds=score.exact,
        written=probe.text or "",
        right_tokens=sum(score.correct),
        tokens=len(score.correct),
    )
