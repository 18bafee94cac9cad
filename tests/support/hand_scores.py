"""Answered probes written by hand, for tests of metrics."""

from __future__ import annotations

import math

from kecore.evaluate import AnsweredProbe
from kecore.inference import ContinuationScore


def score(*probabilities: float, wrong: tuple[int, ...] = ()) -> ContinuationScore:
    """A continuation with these token probabilities; ``wrong`` places have another argmax."""
    ids = tuple(range(10, 10 + len(probabilities)))
    argmax = tuple(99 if i in wrong else id for i, id in enumerate(ids))
    return ContinuationScore(tuple(map(math.log, probabilities)), ids, argmax)


def probe(kind: str = "edit", *scores: ContinuationScore, **fields: object) -> AnsweredProbe:
    answers = tuple(f"answer {i}" for i in range(len(scores)))
    values = {"axis": "", "prompt": "p", "answers": answers, "scores": scores, **fields}
    return AnsweredProbe(kind=kind, **values)  # type: ignore[arg-type]
