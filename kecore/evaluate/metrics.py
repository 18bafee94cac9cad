"""From answered probes to numbers: pure functions and one table of them.

Every metric gives one number for a probe, or None where it does not apply. A record's value is the mean
over its probes (where probes have axes: the mean over axes of the means over their probes), a score is the
mean over records, as in the official CounterFact code. Definitions are those of ROME (arXiv 2202.05262,
section 3.3) for success and magnitude, MEMIT (arXiv 2210.07229) for strict accuracy, and EasyEdit
(arXiv 2401.01286) for token accuracy, portability and locality.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from kecore.evaluate.matching import matches
from kecore.evaluate.protocol import ProbeKind, Protocol
from kecore.evaluate.scoring import ContinuationScore

__all__ = ["METRICS", "AnsweredProbe", "Metric", "measure", "stability"]


@dataclass(frozen=True, slots=True)
class AnsweredProbe:
    """A probe and what the model made of it.

    Args:
        kind: which part of the record it comes from.
        axis: locality or portability axis, else empty.
        prompt: the prompt.
        answers: what is right here: the target on edit and paraphrase, the old answer on neighbourhood.
        scores: one for each answer.
        rival: score of the answer that ``answers[0]`` competes with: the old answer on edit and
            paraphrase, the target on neighbourhood; None where there is none.
        text: the greedy continuation, None where none was asked for.
        stable: share of the answer's places whose argmax is that of the model before the edit; None until
            compared.
    """

    kind: ProbeKind
    axis: str
    prompt: str
    answers: tuple[str, ...]
    scores: tuple[ContinuationScore, ...]
    rival: ContinuationScore | None = None
    text: str | None = None
    stable: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; probabilities are those per token (``exp`` of the mean log-probability)."""
        return {
            "kind": self.kind,
            "axis": self.axis,
            "prompt": self.prompt,
            "answers": list(self.answers),
            "probability": [math.exp(score.mean) for score in self.scores],
            "tokens_correct": [[int(c) for c in score.correct] for score in self.scores],
            "rival_probability": None if self.rival is None else math.exp(self.rival.mean),
            "text": self.text,
            "stable": self.stable,
        }


Measure = Callable[[AnsweredProbe, Protocol], float | None]


def _log(score: ContinuationScore, protocol: Protocol) -> float:
    return score.mean if protocol.probability == "mean" else score.total


def success(probe: AnsweredProbe, protocol: Protocol) -> float | None:
    """1 if the right answer is more probable than its rival, else 0; a tie is 0."""
    if probe.rival is None or not probe.scores:
        return None
    return float(_log(probe.scores[0], protocol) > _log(probe.rival, protocol))


def magnitude(probe: AnsweredProbe, protocol: Protocol) -> float | None:
    """Probability of the right answer minus that of its rival, in [-1, 1]."""
    if probe.rival is None or not probe.scores:
        return None
    return math.exp(_log(probe.scores[0], protocol)) - math.exp(_log(probe.rival, protocol))


def strict_accuracy(probe: AnsweredProbe, protocol: Protocol) -> float | None:
    """1 if under teacher forcing every token of some right answer is the argmax, else 0."""
    return float(any(score.exact for score in probe.scores)) if probe.scores else None


def token_accuracy(probe: AnsweredProbe, protocol: Protocol) -> float | None:
    """Share of argmax tokens under teacher forcing; of several right answers the best one."""
    return max((score.accuracy for score in probe.scores), default=None)


def free_generation(probe: AnsweredProbe, protocol: Protocol) -> float | None:
    """1 if the greedy continuation gives a right answer by the protocol's match rule, else 0."""
    text = probe.text
    if text is None or not probe.answers:
        return None
    return float(any(matches(text, a, protocol.match, loose=protocol.normalise) for a in probe.answers))


def stable(probe: AnsweredProbe, protocol: Protocol) -> float | None:
    """What :func:`stability` found."""
    return probe.stable


def stability(before: AnsweredProbe, after: AnsweredProbe) -> float | None:
    """How much of a model's behaviour on one probe an edit left alone.

    Share of the first answer's places at which both models have the same argmax (EasyEdit's locality,
    which does not ask whether the answer is right). A probe without answers is 1 where both models write
    the same text.

    Returns:
        A number in [0, 1]; None if neither scores nor texts are at hand.
    """
    if before.scores and after.scores:
        pairs = zip(before.scores[0].argmax, after.scores[0].argmax, strict=True)
        return fmean(a == b for a, b in pairs)
    if before.text is None or after.text is None:
        return None
    return float(before.text == after.text)


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of :data:`METRICS`.

    Args:
        key: its name in an evaluation's scores.
        kind: the probes it is taken on.
        measure: its value on one probe.
    """

    key: str
    kind: ProbeKind
    measure: Measure

    def applies(self, protocol: Protocol, compared: bool) -> bool:
        """Whether a run of this protocol measures it at all."""
        if self.measure is free_generation:
            return protocol.max_new_tokens > 0 and self.kind in protocol.generate
        return compared or self.measure is not stable


METRICS: tuple[Metric, ...] = (
    Metric("edit_success", "edit", success),
    Metric("paraphrase_success", "paraphrase", success),
    Metric("neighbourhood_success", "neighbourhood", success),
    Metric("edit_magnitude", "edit", magnitude),
    Metric("paraphrase_magnitude", "paraphrase", magnitude),
    Metric("neighbourhood_magnitude", "neighbourhood", magnitude),
    Metric("strict_accuracy", "edit", strict_accuracy),
    Metric("paraphrase_strict_accuracy", "paraphrase", strict_accuracy),
    Metric("token_accuracy", "edit", token_accuracy),
    Metric("paraphrase_token_accuracy", "paraphrase", token_accuracy),
    Metric("neighbourhood_accuracy", "neighbourhood", strict_accuracy),
    Metric("neighbourhood_stability", "neighbourhood", stable),
    Metric("free_generation", "edit", free_generation),
    Metric("paraphrase_free_generation", "paraphrase", free_generation),
    Metric("neighbourhood_free_generation", "neighbourhood", free_generation),
    Metric("portability", "portability", token_accuracy),
    Metric("portability_strict_accuracy", "portability", strict_accuracy),
    Metric("portability_free_generation", "portability", free_generation),
    Metric("locality", "locality", stable),
    Metric("locality_accuracy", "locality", token_accuracy),
    Metric("locality_strict_accuracy", "locality", strict_accuracy),
    Metric("locality_free_generation", "locality", free_generation),
)
"""Every metric that is a mean over records. ``score`` (harmonic mean) is made from the first three."""

SCORE_PARTS = ("edit_success", "paraphrase_success", "neighbourhood_success")


def measure(probes: Sequence[AnsweredProbe], protocol: Protocol, *, compared: bool) -> Mapping[str, tuple[float, int]]:
    """One record's values.

    Args:
        probes: its answered probes.
        protocol: how to read them.
        compared: stability was filled in.

    Returns:
        Metric key (and, for axes, ``key.axis``) to the record's value and the number of probes behind it.
    """
    found: dict[str, tuple[float, int]] = {}
    for metric in METRICS:
        if not metric.applies(protocol, compared):
            continue
        axes: dict[str, list[float]] = {}
        for probe in probes:
            if probe.kind == metric.kind and (value := metric.measure(probe, protocol)) is not None:
                axes.setdefault(probe.axis, []).append(value)
        if not axes:
            continue
        means = {axis: fmean(values) for axis, values in axes.items()}
        found[metric.key] = (fmean(means.values()), sum(map(len, axes.values())))
        found.update({f"{metric.key}.{a}": (m, len(axes[a])) for a, m in means.items() if a})
    return found
