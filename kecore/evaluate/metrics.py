"""From answered probes to numbers: what a metric is, and what several of them read a probe by.

Every metric gives one number for a probe, or None where it does not apply. Probes of one test (the wordings of
one question) count once: as the best of them, or as the worst where all are needed. A record's value is the mean
over its tests (where probes have axes: the mean over axes of the means over their tests), a score is the mean over
records, as in the official CounterFact code; a probe counts only where its conditions hold, as in RippleEdits (arXiv
2307.12976).

Metrics come in families, which entry points of the group ``kecore.metrics`` lead to: kecore's own, in the plugin
``kecore_metrics``, and a stranger's alike. The families of :data:`STANDARD` are always taken, others where
:attr:`Protocol.extra` names them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from statistics import fmean
from typing import TYPE_CHECKING, Literal, cast

from kecore.api.errors import ConfigError, PluginError
from kecore.api.plugins import Plugins, plugin_limits
from kecore.api.types import NamesAll, ProbeKind
from kecore.evaluate.answers import AnsweredProbe
from kecore.evaluate.matching import Match, matches
from kecore.evaluate.protocol import Protocol
from kecore.inference.scoring import ContinuationScore

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "GROUP",
    "SCORE_PARTS",
    "SIGNED",
    "STANDARD",
    "UNIT",
    "Metric",
    "divergence",
    "families",
    "family",
    "free_generation",
    "log_probability",
    "metrics_of",
    "stability",
    "stable",
    "strict_accuracy",
    "writes",
]

GROUP = "kecore.metrics"
"""The entry-point group: ``family = "package.module:NAME"``, a :class:`Metric` or a tuple of them."""

STANDARD = (
    "success", "magnitude", "strict-accuracy", "token-accuracy", "perplexity", "free-generation", "stability",
    "multi-hop",
)  # fmt: skip
"""Families that every evaluation takes."""

SCORE_PARTS = ("edit_success", "paraphrase_success", "neighbourhood_success")
"""``score`` is the harmonic mean of these."""

UNIT, SIGNED = (0.0, 1.0), (-1.0, 1.0)
"""Bounds of shares, and of differences of shares."""

Measure = Callable[[AnsweredProbe, Protocol], float | None]
Whole = Callable[[Sequence[Sequence[AnsweredProbe]], Protocol], Sequence[Sequence[float | None]]]
Pair = Callable[[AnsweredProbe, AnsweredProbe], float | None]
Reading = Literal["text", "rival", "rivals"]


def log_probability(score: ContinuationScore, protocol: Protocol) -> float:
    """Return the natural logarithm of what the protocol calls the probability of an answer."""
    return score.mean if protocol.probability == "mean" else score.total


def strict_accuracy(probe: AnsweredProbe, protocol: Protocol) -> float | None:
    """Return 1 if under teacher forcing every token of some right answer is the argmax, else 0."""
    if not probe.scores or isinstance(probe.probe.rule, NamesAll):  # several things to name are no one continuation
        return None
    return float(any(score.exact for score in probe.scores))


def free_generation(probe: AnsweredProbe, protocol: Protocol) -> float | None:
    """Return 1 if the greedy continuation gives a right answer by the protocol's match rule, else 0.

    Where several things must be named (:class:`kecore.api.types.NamesAll`), their order is free, so each is only
    looked for as whole words.
    """
    text, rule = probe.text, probe.probe.rule
    if text is None or not probe.answers:
        return None
    if not isinstance(rule, NamesAll):
        return float(_gives(text, probe.answers, protocol.match, loose=protocol.normalise))
    spellings_of_each = (probe.answers, *rule.others)
    return float(all(_gives(text, names, "contains", loose=protocol.normalise) for names in spellings_of_each))


def _gives(text: str, answers: Sequence[str], match: Match, *, loose: bool) -> bool:
    return any(matches(text, answer, match, loose=loose) for answer in answers)


def stable(probe: AnsweredProbe, protocol: Protocol) -> float | None:
    """Return what :func:`stability` measured."""
    return probe.stable


def stability(before: AnsweredProbe, after: AnsweredProbe) -> float | None:
    """Measure how much of a model's behaviour on one probe an edit left alone.

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


def divergence(before: Tensor, after: Tensor) -> float | None:
    """KL(before || after) of two next-token distributions, in nats (CounterFact+, arXiv 2305.17553).

    Args:
        before: natural-log probabilities ``[vocab]``.
        after: the same of the other model.

    Returns:
        A number of at least 0; None where it is not finite, as for a model whose logits are not.
    """
    p, q = before.double(), after.double()
    value = float((p.exp() * (p - q)).sum())
    return max(value, 0.0) if math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class Metric:
    """A number of an evaluation: how it is taken from the probes of one kind.

    Exactly one of ``measure``, ``whole`` and ``pair`` is given.

    Args:
        key: its name in an evaluation's scores; no dot.
        kind: the probes it is taken on.
        measure: its value on one answered probe, a pure function that is worked out whenever scores are read.
        whole: its values on the probes of all records at once (one list a record), for metrics that cost; called
            once, right after the model has answered, and stored with the probes.
        pair: its value on a probe answered before and after the edit; called by :func:`kecore.evaluate.compare`.
        reads: what the model is asked for its sake beside the scores of the answers: ``text``, the free continuation;
            ``rival``, the score of the first rival; ``rivals``, those of all.
        distribution: it compares next-token distributions by :func:`divergence`; then no function is given.
        heading: what stands above its column; by default its key in words.
        meaning: what it says, in a line, for readers of a table.
        core: it stands in the main table; others stand in the table of further scores.
        bounds: the least and the greatest value there can be, which decide how its interval is taken
            (:func:`kecore.evaluate.intervals.interval`).
        lower: lower values are better.
        lacks: what a record lacks whose probes have no value, in a few words, for the list of what is missing.
    """

    key: str
    kind: ProbeKind
    measure: Measure | None = None
    whole: Whole | None = None
    pair: Pair | None = None
    reads: tuple[Reading, ...] = ()
    distribution: bool = False
    heading: str = ""
    meaning: str = ""
    core: bool = False
    bounds: tuple[float, float] = (-math.inf, math.inf)
    lower: bool = False
    lacks: str = "no value on its probes"

    @property
    def name(self) -> str:
        """Its key in words."""
        return self.key.replace("_", " ")

    def applies(self, protocol: Protocol, compared: bool) -> bool:
        """Return whether a run of this protocol measures it at all."""
        if "text" in self.reads and not writes(self.kind, protocol):
            return False
        return compared or not (self.pair or self.distribution or self.measure is stable)

    def value(self, probe: AnsweredProbe, protocol: Protocol) -> float | None:
        """Return the number for one answered probe, None where it has none."""
        return self.measure(probe, protocol) if self.measure else probe.measured.get(self.key)


def writes(kind: str, protocol: Protocol) -> bool:
    """Return whether probes of a kind are answered by free text under this protocol."""
    if kind == "generation":  # has a length of its own
        return True
    return protocol.max_new_tokens > 0 and (kind in protocol.generate or kind in ("multi_hop", "hop"))


def _check(value: object, name: str, source: str) -> tuple[Metric, ...]:
    metrics = value if isinstance(value, tuple) else (value,)
    for metric in metrics:
        if not isinstance(metric, Metric):
            raise PluginError(f"{source} must lead to a Metric or a tuple of them, got {metric!r:.80}")
        ways = [way for way in (metric.measure, metric.whole, metric.pair, metric.distribution) if way]
        if len(ways) != 1 or "." in metric.key or not metric.key:
            raise PluginError(
                f"{source}: metric {metric.key!r} needs exactly one of measure, whole, pair and distribution, and a "
                "key without dots"
            )
    return cast("tuple[Metric, ...]", metrics)


@cache
def _plugins() -> Plugins[tuple[Metric, ...]]:
    return Plugins(
        entry_points(group=GROUP), noun="metric family", check=_check, missing=ConfigError, **plugin_limits()
    )


def family(name: str) -> tuple[Metric, ...]:
    """Return the metrics of one installed family.

    Raises:
        ConfigError: nothing of that name is installed; suggests near names.
        PluginError: it cannot be imported, or does not lead to metrics.
    """
    return _plugins().get(name)


def families() -> dict[str, tuple[Metric, ...]]:
    """Return the metrics of every installed family that can be used, by its name."""
    return _plugins().all()


def metrics_of(protocol: Protocol) -> tuple[Metric, ...]:
    """Return every metric that runs of a protocol take, standard families first.

    Raises:
        ConfigError: a family is not installed, or two metrics have one key.
        PluginError: a family cannot be used.
    """
    return _taken(protocol.extra)


@cache
def _taken(extra: tuple[str, ...]) -> tuple[Metric, ...]:
    owners: dict[str, str] = {"score": "kecore"}
    metrics: list[Metric] = []
    for name in dict.fromkeys((*STANDARD, *extra)):
        for metric in family(name):
            if metric.key in owners:
                raise ConfigError(f"metric families '{owners[metric.key]}' and '{name}' both have a '{metric.key}'")
            owners[metric.key] = name
            metrics.append(metric)
    return tuple(metrics)
