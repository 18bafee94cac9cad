"""Answered probes written by hand, for tests of metrics."""

from __future__ import annotations

import math
from typing import Any

from kecore.api.types import NamesAll, OneAnswer, Probe
from kecore.evaluate import AnsweredProbe
from kecore.inference import ContinuationScore


def score(*probabilities: float, wrong: tuple[int, ...] = ()) -> ContinuationScore:
    """A continuation with these token probabilities; ``wrong`` places have another argmax."""
    ids = tuple(range(10, 10 + len(probabilities)))
    argmax = tuple(99 if i in wrong else id for i, id in enumerate(ids))
    return ContinuationScore(tuple(map(math.log, probabilities)), ids, argmax)


def probe(
    kind: Any = "edit",
    *scores: ContinuationScore,
    prompt: str = "p",
    answers: tuple[str, ...] | None = None,
    rival: ContinuationScore | None = None,
    also: tuple[tuple[str, ...], ...] = (),
    axis: str = "",
    test: str = "",
    need: Any = "any",
    **answer: Any,
) -> AnsweredProbe:
    """A probe with its answer; ``also`` are further things to be named, and ``answer`` fields of AnsweredProbe."""
    texts = tuple(f"answer {i}" for i in range(len(scores))) if answers is None else answers
    rule = NamesAll(also) if also else OneAnswer()
    asked = Probe(kind, prompt, texts, axis=axis, rule=rule, test=test, need=need)
    return AnsweredProbe(asked, scores, () if rival is None else (rival,), **answer)
