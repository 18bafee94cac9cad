"""A probe with what a model made of it, and how such rows are stored."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

from pydantic import TypeAdapter

from kecore.api.types import BackgroundKind, NamesAll, OneAnswer, Probe, ProbeKind, Rule, SafeReply
from kecore.inference.scoring import ContinuationScore

__all__ = ["AnsweredProbe", "RecordResult"]


@dataclass(frozen=True, slots=True)
class AnsweredProbe:
    """A probe and what the model made of it.

    Args:
        probe: what was asked; without its conditions, of which ``holds`` tells.
        scores: one for each answer.
        rival_scores: one for each rival that some metric reads: the first one, where metrics compare with it, or all.
        text: the greedy continuation, None where none was asked for.
        stable: share of the answer's places whose argmax is that of the model before the edit; None until
            compared.
        holds: whether the conditions for this probe to count hold on the model before the edit (until compared,
            on the model that was asked); None where it has none.
        measured: what metrics found that take all probes at once or two models, by their keys.
    """

    probe: Probe
    scores: tuple[ContinuationScore, ...] = ()
    rival_scores: tuple[ContinuationScore, ...] = ()
    text: str | None = None
    stable: float | None = None
    holds: bool | None = None
    measured: Mapping[str, float] = field(default_factory=dict)

    @property
    def kind(self) -> ProbeKind | BackgroundKind:
        """What the probe is for."""
        return self.probe.kind

    @property
    def prompt(self) -> str:
        """What was asked."""
        return self.probe.prompt

    @property
    def answers(self) -> tuple[str, ...]:
        """What is right."""
        return self.probe.answers

    @property
    def rival(self) -> ContinuationScore | None:
        """Score of the text that the first answer competes with; None where there is none."""
        return self.rival_scores[0] if self.rival_scores else None

    def to_json(self) -> dict[str, Any]:
        """Return the probe as JSON values; probabilities are those per token (``exp`` of the mean log-probability)."""
        return {
            "kind": self.kind,
            "axis": self.probe.axis,
            "prompt": self.prompt,
            "answers": list(self.answers),
            "probability": [math.exp(score.mean) for score in self.scores],
            "tokens_correct": [list(map(int, score.correct)) for score in self.scores],
            "rival_probability": None if self.rival is None else math.exp(self.rival.mean),
            "text": self.text,
            "stable": self.stable,
            "holds": self.holds,
            "measured": dict(self.measured),
        }


@dataclass(frozen=True, slots=True)
class RecordResult:
    """One record's part of an evaluation.

    Args:
        id: the request's id.
        source: data set and place of the record.
        probes: its answered probes.
    """

    id: str
    source: str
    probes: tuple[AnsweredProbe, ...]

    def probes_of(self, kind: str) -> list[AnsweredProbe]:
        """Return the answered probes of one kind, in order."""
        return [answered for answered in self.probes if answered.kind == kind]

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON values, for people; :meth:`dump` keeps every bit."""
        return {"id": self.id, "source": self.source, "probes": [probe.to_json() for probe in self.probes]}

    def dump(self) -> str:
        """Return everything as JSON text, for :meth:`load`; numbers keep every bit."""
        stored = _StoredRow(self.id, self.source, tuple(map(_to_stored, self.probes)))
        # Not pydantic's own JSON, which turns the infinite log-probability of a broken model into null.
        return json.dumps(_rows().dump_python(stored, mode="python"), ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def load(cls, text: str) -> RecordResult:
        """Read what :meth:`dump` wrote."""
        stored = _rows().validate_python(json.loads(text))
        return cls(stored.id, stored.source, tuple(map(_from_stored, stored.probes)))


@dataclass(frozen=True, slots=True)
class _StoredProbe:
    """An answered probe as files of format 1 hold it: flat, its rule as ``also`` or ``safe``.

    ``rival`` and ``rivals`` are scores; ``rival_texts``, which older files lack, are the texts they belong to.
    """

    kind: ProbeKind | BackgroundKind
    axis: str
    prompt: str
    answers: tuple[str, ...]
    scores: tuple[ContinuationScore, ...]
    rival: ContinuationScore | None = None
    text: str | None = None
    stable: float | None = None
    test: str = ""
    need: Literal["any", "all"] = "any"
    also: tuple[tuple[str, ...], ...] = ()
    holds: bool | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    safe: str = ""
    rivals: tuple[ContinuationScore, ...] = ()
    rival_texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _StoredRow:
    id: str
    source: str
    probes: tuple[_StoredProbe, ...]


@cache
def _rows() -> TypeAdapter[_StoredRow]:
    return TypeAdapter(_StoredRow)


def _to_stored(answered: AnsweredProbe) -> _StoredProbe:
    probe = answered.probe
    return _StoredProbe(
        kind=probe.kind,
        axis=probe.axis,
        prompt=probe.prompt,
        answers=probe.answers,
        scores=answered.scores,
        rival=answered.rival,
        text=answered.text,
        stable=answered.stable,
        test=probe.test,
        need=probe.need,
        also=probe.rule.others if isinstance(probe.rule, NamesAll) else (),
        holds=answered.holds,
        measured=answered.measured,
        safe=probe.rule.example if isinstance(probe.rule, SafeReply) else "",
        rivals=answered.rival_scores[1:],
        rival_texts=probe.rivals,
    )


def _from_stored(stored: _StoredProbe) -> AnsweredProbe:
    probe = Probe(stored.kind, stored.prompt, stored.answers, stored.rival_texts, axis=stored.axis)
    rival_scores = () if stored.rival is None else (stored.rival, *stored.rivals)
    return AnsweredProbe(
        replace(probe, rule=_stored_rule(stored), test=stored.test, need=stored.need),
        stored.scores,
        rival_scores,
        stored.text,
        stored.stable,
        stored.holds,
        stored.measured,
    )


def _stored_rule(stored: _StoredProbe) -> Rule:
    if stored.also:
        return NamesAll(stored.also)
    return SafeReply(stored.safe) if stored.safe else OneAnswer()
