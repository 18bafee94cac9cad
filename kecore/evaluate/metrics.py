"""From answered probes to numbers: the standard metrics, and what any metric is.

Every metric gives one number for a probe, or None where it does not apply. Probes of one test (the wordings of
one question) count once: as the best of them, or as the worst where all are needed. A record's value is the mean
over its tests (where probes have axes: the mean over axes of the means over their tests), a score is the mean over
records, as in the official CounterFact code. Definitions are those of ROME (arXiv 2202.05262, section 3.3) for
success and magnitude, MEMIT (arXiv 2210.07229) for strict accuracy, EasyEdit (arXiv 2401.01286) for token accuracy,
portability and locality, MQuAKE (arXiv 2305.14795, section 4) for multi-hop accuracy, RippleEdits (arXiv 2307.12976)
for conditions.

Metrics come in families, which entry points of the group ``kecore.metrics`` lead to: kecore's own and a stranger's
alike. The families of :data:`STANDARD` are always taken, others where :attr:`Protocol.extra` names them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, cast

from kecore.errors import ConfigError, PluginError
from kecore.evaluate.matching import matches
from kecore.evaluate.protocol import ProbeKind, Protocol
from kecore.evaluate.scoring import ContinuationScore
from kecore.registry import Plugins, limits

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "GROUP",
    "STANDARD",
    "AnsweredProbe",
    "Metric",
    "divergence",
    "family",
    "measure",
    "metrics_of",
    "stability",
    "writes",
]

GROUP = "kecore.metrics"
"""The entry-point group: ``family = "package.module:NAME"``, a :class:`Metric` or a tuple of them."""

STANDARD = (
    "success", "magnitude", "strict-accuracy", "token-accuracy", "free-generation", "stability", "multi-hop",
)  # fmt: skip
"""Families that every evaluation takes."""


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
        test: probes of one kind, axis and test count once; empty where the probe is a test by itself.
        need: ``any`` of the test's prompts must be answered rightly, or ``all``.
        also: further things that ``text`` must name, each with its spellings.
        holds: whether the conditions for this probe to count hold on the model before the edit (until compared,
            on the model that was asked); None where it has none.
        measured: what metrics found that take all probes at once or two models, by their keys.
    """

    kind: ProbeKind
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
            "holds": self.holds,
            "measured": dict(self.measured),
        }


Measure = Callable[[AnsweredProbe, Protocol], float | None]
Whole = Callable[[Sequence[Sequence[AnsweredProbe]], Protocol], Sequence[Sequence[float | None]]]
Pair = Callable[[AnsweredProbe, AnsweredProbe], float | None]


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
    if probe.also or not probe.scores:  # several things to name are no one continuation
        return None
    return float(any(score.exact for score in probe.scores))


def token_accuracy(probe: AnsweredProbe, protocol: Protocol) -> float | None:
    """Share of argmax tokens under teacher forcing; of several right answers the best one."""
    return None if probe.also else max((score.accuracy for score in probe.scores), default=None)


def free_generation(probe: AnsweredProbe, protocol: Protocol) -> float | None:
    """1 if the greedy continuation gives a right answer by the protocol's match rule, else 0.

    Where several things must be named (``also``), their order is free, so each is only looked for as whole words.
    """
    text = probe.text
    if text is None or not probe.answers:
        return None
    rule = "contains" if probe.also else protocol.match
    named = (probe.answers, *probe.also)
    return float(all(any(matches(text, a, rule, loose=protocol.normalise) for a in spellings) for spellings in named))


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
        text: it reads the free continuation.
        distribution: it compares next-token distributions by :func:`divergence`; then no function is given.
    """

    key: str
    kind: ProbeKind
    measure: Measure | None = None
    whole: Whole | None = None
    pair: Pair | None = None
    text: bool = False
    distribution: bool = False

    def applies(self, protocol: Protocol, compared: bool) -> bool:
        """Whether a run of this protocol measures it at all."""
        if self.text and not writes(self.kind, protocol):
            return False
        return compared or not (self.pair or self.distribution or self.measure is stable)

    def value(self, probe: AnsweredProbe, protocol: Protocol) -> float | None:
        """The number for one answered probe, None where it has none."""
        return self.measure(probe, protocol) if self.measure else probe.measured.get(self.key)


def writes(kind: ProbeKind, protocol: Protocol) -> bool:
    """Whether probes of a kind are answered by free text under this protocol."""
    if kind == "generation":  # has a length of its own
        return True
    return protocol.max_new_tokens > 0 and (kind in protocol.generate or kind in ("multi_hop", "hop"))


SUCCESS = (
    Metric("edit_success", "edit", success),
    Metric("paraphrase_success", "paraphrase", success),
    Metric("neighbourhood_success", "neighbourhood", success),
)
MAGNITUDE = (
    Metric("edit_magnitude", "edit", magnitude),
    Metric("paraphrase_magnitude", "paraphrase", magnitude),
    Metric("neighbourhood_magnitude", "neighbourhood", magnitude),
)
STRICT_ACCURACY = (
    Metric("strict_accuracy", "edit", strict_accuracy),
    Metric("paraphrase_strict_accuracy", "paraphrase", strict_accuracy),
    Metric("neighbourhood_accuracy", "neighbourhood", strict_accuracy),
    Metric("portability_strict_accuracy", "portability", strict_accuracy),
    Metric("locality_strict_accuracy", "locality", strict_accuracy),
)
TOKEN_ACCURACY = (
    Metric("token_accuracy", "edit", token_accuracy),
    Metric("paraphrase_token_accuracy", "paraphrase", token_accuracy),
    Metric("portability", "portability", token_accuracy),
    Metric("locality_accuracy", "locality", token_accuracy),
)
FREE_GENERATION = (
    Metric("free_generation", "edit", free_generation, text=True),
    Metric("paraphrase_free_generation", "paraphrase", free_generation, text=True),
    Metric("neighbourhood_free_generation", "neighbourhood", free_generation, text=True),
    Metric("portability_free_generation", "portability", free_generation, text=True),
    Metric("locality_free_generation", "locality", free_generation, text=True),
)
STABILITY = (
    Metric("neighbourhood_stability", "neighbourhood", stable),
    Metric("locality", "locality", stable),
)
MULTI_HOP = (
    Metric("multi_hop", "multi_hop", free_generation, text=True),
    Metric("multi_hop_strict_accuracy", "multi_hop", strict_accuracy),
    Metric("hop_accuracy", "hop", free_generation, text=True),
    Metric("hop_strict_accuracy", "hop", strict_accuracy),
)
DIVERGENCE = (
    Metric("neighbourhood_kl", "neighbourhood", distribution=True),
    Metric("locality_kl", "locality", distribution=True),
)
SCORE_PARTS = ("edit_success", "paraphrase_success", "neighbourhood_success")
"""``score`` is the harmonic mean of these."""


def _check(found: object, name: str, source: str) -> tuple[Metric, ...]:
    metrics = found if isinstance(found, tuple) else (found,)
    for metric in metrics:
        if not isinstance(metric, Metric):
            raise PluginError(f"{source} must lead to a Metric or a tuple of them, got {metric!r:.80}")
        given = sum(bool(way) for way in (metric.measure, metric.whole, metric.pair, metric.distribution))
        if given != 1 or "." in metric.key or not metric.key:
            raise PluginError(
                f"{source}: metric {metric.key!r} needs exactly one of measure, whole, pair and distribution, and a "
                "key without dots"
            )
    return cast("tuple[Metric, ...]", metrics)


@cache
def _plugins() -> Plugins[tuple[Metric, ...]]:
    return Plugins(entry_points(group=GROUP), noun="metric family", check=_check, missing=ConfigError, **limits())


def family(name: str) -> tuple[Metric, ...]:
    """The metrics of one installed family.

    Raises:
        ConfigError: nothing of that name is installed; suggests near names.
        PluginError: it cannot be imported, or does not lead to metrics.
    """
    return _plugins().get(name)


def metrics_of(protocol: Protocol) -> tuple[Metric, ...]:
    """Every metric that runs of a protocol take, standard families first.

    Raises:
        ConfigError: a family is not installed, or two metrics have one key.
        PluginError: a family cannot be used.
    """
    return _taken(protocol.extra)


@cache
def _taken(extra: tuple[str, ...]) -> tuple[Metric, ...]:
    found: dict[str, str] = {"score": "kecore"}
    metrics: list[Metric] = []
    for name in dict.fromkeys((*STANDARD, *extra)):
        for metric in family(name):
            if metric.key in found:
                raise ConfigError(f"metric families '{found[metric.key]}' and '{name}' both have a '{metric.key}'")
            found[metric.key] = name
            metrics.append(metric)
    return tuple(metrics)


def measure(probes: Sequence[AnsweredProbe], protocol: Protocol, *, compared: bool) -> Mapping[str, tuple[float, int]]:
    """One record's values.

    A probe whose conditions do not hold on the model before the edit is left out.

    Args:
        probes: its answered probes.
        protocol: how to read them.
        compared: the probes carry what needs the model before the edit.

    Returns:
        Metric key (and, for axes, ``key.axis``) to the record's value and the number of probes behind it.
    """
    found: dict[str, tuple[float, int]] = {}
    for metric in metrics_of(protocol):
        if not metric.applies(protocol, compared):
            continue
        axes: dict[str, dict[str, list[float]]] = {}
        needs: dict[tuple[str, str], str] = {}
        for place, probe in enumerate(probes):
            if probe.kind != metric.kind or probe.holds is False:
                continue
            if (value := metric.value(probe, protocol)) is not None:
                test = probe.test or f"#{place}"
                axes.setdefault(probe.axis, {}).setdefault(test, []).append(value)
                needs[probe.axis, test] = probe.need
        if not axes:
            continue
        means = {
            axis: fmean(_one(values, needs[axis, test]) for test, values in tests.items())
            for axis, tests in axes.items()
        }
        counts = {axis: sum(map(len, tests.values())) for axis, tests in axes.items()}
        found[metric.key] = (fmean(means.values()), sum(counts.values()))
        found.update({f"{metric.key}.{a}": (m, counts[a]) for a, m in means.items() if a})
    return found


def _one(values: Iterable[float], need: str) -> float:
    return max(values) if need == "any" else min(values)
