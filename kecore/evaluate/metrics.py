"""From answered probes to numbers: the standard metrics, and what any metric is.

Every metric gives one number for a probe, or None where it does not apply. Probes of one test (the wordings of
one question) count once: as the best of them, or as the worst where all are needed. A record's value is the mean
over its tests (where probes have axes: the mean over axes of the means over their tests), a score is the mean over
records, as in the official CounterFact code. Definitions are those of ROME (arXiv 2202.05262, section 3.3) for
success and magnitude, MEMIT (arXiv 2210.07229) for strict accuracy, EasyEdit (arXiv 2401.01286) for token accuracy,
portability, locality and the perplexity of the target, MQuAKE (arXiv 2305.14795, section 4) for multi-hop accuracy,
RippleEdits (arXiv 2307.12976) for conditions.

Metrics come in families, which entry points of the group ``kecore.metrics`` lead to: kecore's own and a stranger's
alike. The families of :data:`STANDARD` are always taken, others where :attr:`Protocol.extra` names them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
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
    "STANDARD",
    "Metric",
    "divergence",
    "family",
    "log_probability",
    "metrics_of",
    "opinion",
    "stability",
    "writes",
]

GROUP = "kecore.metrics"
"""The entry-point group: ``family = "package.module:NAME"``, a :class:`Metric` or a tuple of them."""

STANDARD = (
    "success", "magnitude", "strict-accuracy", "token-accuracy", "perplexity", "free-generation", "stability",
    "multi-hop",
)  # fmt: skip
"""Families that every evaluation takes."""


_LARGEST = 709.0
"""Nats beyond which ``exp`` overflows."""

Measure = Callable[[AnsweredProbe, Protocol], float | None]
Whole = Callable[[Sequence[Sequence[AnsweredProbe]], Protocol], Sequence[Sequence[float | None]]]
Pair = Callable[[AnsweredProbe, AnsweredProbe], float | None]
Reading = Literal["text", "rival", "rivals"]


def log_probability(score: ContinuationScore, protocol: Protocol) -> float:
    """Return the natural logarithm of what the protocol calls the probability of an answer."""
    return score.mean if protocol.probability == "mean" else score.total


def success(probe: AnsweredProbe, protocol: Protocol) -> float | None:
    """Return 1 if the right answer is more probable than its rival, else 0; a tie is 0."""
    if probe.rival is None or not probe.scores:
        return None
    return float(log_probability(probe.scores[0], protocol) > log_probability(probe.rival, protocol))


def magnitude(probe: AnsweredProbe, protocol: Protocol) -> float | None:
    """Return the probability of the right answer minus that of its rival, in [-1, 1]."""
    if probe.rival is None or not probe.scores:
        return None
    return math.exp(log_probability(probe.scores[0], protocol)) - math.exp(log_probability(probe.rival, protocol))


def strict_accuracy(probe: AnsweredProbe, protocol: Protocol) -> float | None:
    """Return 1 if under teacher forcing every token of some right answer is the argmax, else 0."""
    if not probe.scores or isinstance(probe.probe.rule, NamesAll):  # several things to name are no one continuation
        return None
    return float(any(score.exact for score in probe.scores))


def token_accuracy(probe: AnsweredProbe, protocol: Protocol) -> float | None:
    """Return the share of argmax tokens under teacher forcing; of several right answers the best one."""
    if not probe.scores or isinstance(probe.probe.rule, NamesAll):
        return None
    return max(score.accuracy for score in probe.scores)


def perplexity(probe: AnsweredProbe, protocol: Protocol) -> float | None:
    """Return ``exp`` of the mean negative log-probability of the target's tokens; None where it overflows."""
    if not probe.scores or probe.scores[0].mean < -_LARGEST:
        return None
    return math.exp(-probe.scores[0].mean)


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


def opinion(before: AnsweredProbe, after: AnsweredProbe) -> float | None:
    """Measure how far an edit turned an opinion to what the model was to say (SERAC, arXiv 2206.06520).

    ``z_sentiment * z_topic`` with ``z_sentiment = sigmoid(new - old)`` and ``z_topic = min(1, exp(new - new_before))``,
    where ``new`` and ``old`` are the mean log-probabilities of the tokens of all replies of either sentiment after the
    edit: the replies are the probe's answers, and its rivals.

    Returns:
        A number in [0, 1]; None where a side has no replies, or the model's logits are not finite.
    """
    new, old = _per_token(after.scores), _per_token(after.rival_scores)
    new_before = _per_token(before.scores)
    if new is None or old is None or new_before is None:
        return None
    return 1 / (1 + math.exp(min(old - new, _LARGEST))) * math.exp(min(new - new_before, 0.0))


def _per_token(scores: Sequence[ContinuationScore]) -> float | None:
    """Return the mean log-probability of the tokens of all continuations."""
    tokens = sum(len(score.ids) for score in scores)
    mean = math.fsum(score.total for score in scores) / tokens if tokens else -math.inf
    return mean if math.isfinite(mean) else None


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


UNIT, SIGNED = (0.0, 1.0), (-1.0, 1.0)
"""Bounds of shares, and of differences of shares."""

_WORDINGS = "the same on other wordings"
_IMPLIED, _STAYS = "the same of what should follow from the edit", "the same of the answer that should stay"
_NO_RIVAL = "no old answer to compare with"
_NO_ANSWER = "no answer that is one text"
_success = partial(Metric, measure=success, reads=("rival",), bounds=UNIT, core=True, lacks=_NO_RIVAL)
_magnitude = partial(Metric, measure=magnitude, reads=("rival",), bounds=SIGNED, lacks=_NO_RIVAL)
_strict = partial(Metric, measure=strict_accuracy, bounds=UNIT, lacks=_NO_ANSWER)
_tokens = partial(Metric, measure=token_accuracy, bounds=UNIT, lacks=_NO_ANSWER)
_perplexity = partial(Metric, measure=perplexity, bounds=(1.0, math.inf), lower=True, lacks="probabilities of 0")
_free = partial(Metric, measure=free_generation, reads=("text",), bounds=UNIT, lacks="no answer to look for")
_stable = partial(Metric, measure=stable, bounds=UNIT, core=True, lacks="neither answers nor texts to compare")
_kl = partial(Metric, distribution=True, bounds=(0.0, math.inf), lower=True, lacks="logits that are not finite")

SUCCESS = (
    _success(
        "edit_success", "edit", heading="ES",
        meaning="share of edited prompts on which the target is more probable than the old answer",
    ),
    _success("paraphrase_success", "paraphrase", heading="PS", meaning=_WORDINGS),
    _success(
        "neighbourhood_success", "neighbourhood", heading="NS",
        meaning="share of prompts on other subjects on which the old answer is more probable than the target",
    ),
)  # fmt: skip
MAGNITUDE = (
    _magnitude("edit_magnitude", "edit", meaning="P of the target minus P of the old answer"),
    _magnitude("paraphrase_magnitude", "paraphrase", meaning=_WORDINGS),
    _magnitude("neighbourhood_magnitude", "neighbourhood", meaning="P of the old answer minus P of the target"),
)
STRICT_ACCURACY = (
    _strict(
        "strict_accuracy", "edit", heading="strict", core=True,
        meaning="every token of the target is the most probable one under teacher forcing",
    ),
    _strict("paraphrase_strict_accuracy", "paraphrase", heading="strict, para.", core=True, meaning=_WORDINGS),
    _strict("neighbourhood_accuracy", "neighbourhood", heading="strict, neigh.", meaning="the same of the old answer"),
    _strict("portability_strict_accuracy", "portability", heading="strict, portab.", meaning=_IMPLIED),
    _strict("locality_strict_accuracy", "locality", heading="strict, local.", meaning=_STAYS),
)  # fmt: skip
TOKEN_ACCURACY = (
    _tokens("token_accuracy", "edit", heading="tokens", meaning="share of the target's tokens that are most probable"),
    _tokens("paraphrase_token_accuracy", "paraphrase", heading="tokens, para.", meaning=_WORDINGS),
    _tokens(
        "portability", "portability", heading="portab.", core=True,
        meaning="share of right tokens of what should follow from the edit",
    ),
    _tokens("locality_accuracy", "locality", heading="tokens, local.", meaning=_STAYS),
)  # fmt: skip
PERPLEXITY = (
    _perplexity("perplexity", "edit", heading="PPL", meaning="perplexity of the target after the edited prompt"),
    _perplexity("paraphrase_perplexity", "paraphrase", heading="PPL, para.", meaning=_WORDINGS),
)
FREE_GENERATION = (
    _free("free_generation", "edit", heading="free", core=True, meaning="the model writes the target"),
    _free("paraphrase_free_generation", "paraphrase", heading="free, para.", core=True, meaning=_WORDINGS),
    _free(
        "neighbourhood_free_generation", "neighbourhood", heading="free, neigh.", meaning="the same of the old answer"
    ),
    _free("portability_free_generation", "portability", heading="free, portab.", meaning=_IMPLIED),
    _free("locality_free_generation", "locality", heading="free, local.", meaning=_STAYS),
)
STABILITY = (
    _stable(
        "neighbourhood_stability", "neighbourhood", heading="NS stable",
        meaning="share of answer tokens on neighbours whose most probable token the edit left as it was",
    ),
    _stable(
        "locality", "locality",
        meaning="share of answer tokens on locality probes that the edit left as they were, right or wrong",
    ),
)  # fmt: skip
MULTI_HOP = (
    _free(
        "multi_hop", "multi_hop", heading="multi-hop", core=True,
        meaning="questions over several hops answered rightly in free text, in one of their wordings",
    ),
    _strict("multi_hop_strict_accuracy", "multi_hop", heading="strict, hops", meaning="by strict accuracy"),
    _free("hop_accuracy", "hop", heading="hops", core=True, meaning="chains of which every single hop is right"),
    _strict("hop_strict_accuracy", "hop", heading="strict, each hop", meaning="by strict accuracy"),
)  # fmt: skip
DIVERGENCE = (
    _kl(
        "neighbourhood_kl", "neighbourhood", heading="KL, neigh.", core=True,
        meaning="divergence of the next token's distribution from that of the unedited model, in nats",
    ),
    _kl("locality_kl", "locality", heading="KL, local.", core=True, meaning="the same on other locality probes"),
)  # fmt: skip
OPINION = (
    Metric(
        "opinion", "paraphrase", pair=opinion, reads=("rivals",), core=True, bounds=UNIT,
        lacks="no replies of both kinds",
        meaning="how much likelier the new replies are than the old ones, if no less likely than before (SERAC's ES)",
    ),
)  # fmt: skip
SCORE_PARTS = ("edit_success", "paraphrase_success", "neighbourhood_success")
"""``score`` is the harmonic mean of these."""


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
