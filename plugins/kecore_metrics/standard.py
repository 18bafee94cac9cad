"""The standard metrics: ES, PS and NS, accuracies under teacher forcing and in free text, locality, several hops.

Definitions are those of ROME (arXiv 2202.05262, section 3.3) for success and magnitude, MEMIT (arXiv 2210.07229) for
strict accuracy, EasyEdit (arXiv 2401.01286) for token accuracy, portability, locality and the perplexity of the target,
MQuAKE (arXiv 2305.14795, section 4) for multi-hop accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from kecore.api.types import NamesAll
from kecore.evaluate import AnsweredProbe, Metric, Protocol
from kecore.evaluate.metrics import SIGNED, UNIT, free_generation, log_probability, stable, strict_accuracy
from kecore.inference.scoring import ContinuationScore

_LARGEST = 709.0
"""Nats beyond which ``exp`` overflows."""


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


_EACH_PIECE = "every token of"
_DIVERGENCE = "divergence of the next token's distribution from the unedited model's, in nats"
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
    _success(
        "paraphrase_success", "paraphrase", heading="PS",
        meaning="share of paraphrases on which the target is more probable than the old answer",
    ),
    _success(
        "neighbourhood_success", "neighbourhood", heading="NS",
        meaning="share of prompts on other subjects on which the old answer is more probable than the target",
    ),
)  # fmt: skip
MAGNITUDE = (
    _magnitude("edit_magnitude", "edit", meaning="P of the target minus P of the old answer, on edited prompts"),
    _magnitude(
        "paraphrase_magnitude", "paraphrase", meaning="P of the target minus P of the old answer, on paraphrases"
    ),
    _magnitude(
        "neighbourhood_magnitude",
        "neighbourhood",
        meaning="P of the old answer minus P of the target, on prompts on other subjects",
    ),
)
STRICT_ACCURACY = (
    _strict(
        "strict_accuracy", "edit", heading="strict", core=True,
        meaning=f"share of edited prompts on which {_EACH_PIECE} the target is the most probable one",
    ),
    _strict(
        "paraphrase_strict_accuracy", "paraphrase", heading="strict, para.", core=True,
        meaning=f"share of paraphrases on which {_EACH_PIECE} the target is the most probable one",
    ),
    _strict(
        "neighbourhood_accuracy", "neighbourhood", heading="strict, neigh.",
        meaning=f"share of prompts on other subjects on which {_EACH_PIECE} the old answer is the most probable one",
    ),
    _strict(
        "portability_strict_accuracy", "portability", heading="strict, portab.",
        meaning=f"share of what follows from the edit of which {_EACH_PIECE} the answer is the most probable one",
    ),
    _strict(
        "locality_strict_accuracy", "locality", heading="strict, local.",
        meaning=f"share of what should stay of which {_EACH_PIECE} the answer is the most probable one",
    ),
)  # fmt: skip
TOKEN_ACCURACY = (
    _tokens(
        "token_accuracy", "edit", heading="tokens",
        meaning="share of the target's tokens that are the most probable ones after the edited prompt",
    ),
    _tokens(
        "paraphrase_token_accuracy", "paraphrase", heading="tokens, para.",
        meaning="share of the target's tokens that are the most probable ones after a paraphrase",
    ),
    _tokens(
        "portability", "portability", heading="portab.", core=True,
        meaning="share of right tokens of what should follow from the edit",
    ),
    _tokens(
        "locality_accuracy", "locality", heading="tokens, local.",
        meaning="share of right tokens of answers that should stay",
    ),
)  # fmt: skip
PERPLEXITY = (
    _perplexity("perplexity", "edit", heading="PPL", meaning="perplexity of the target after the edited prompt"),
    _perplexity(
        "paraphrase_perplexity",
        "paraphrase",
        heading="PPL, para.",
        meaning="perplexity of the target after paraphrases",
    ),
)
FREE_GENERATION = (
    _free(
        "free_generation", "edit", heading="free", core=True,
        meaning="share of edited prompts on which the model writes the target by itself",
    ),
    _free(
        "paraphrase_free_generation", "paraphrase", heading="free, para.", core=True,
        meaning="share of paraphrases on which the model writes the target by itself",
    ),
    _free(
        "neighbourhood_free_generation", "neighbourhood", heading="free, neigh.",
        meaning="share of prompts on other subjects on which the model writes the old answer by itself",
    ),
    _free(
        "portability_free_generation", "portability", heading="free, portab.",
        meaning="share of what follows from the edit that the model writes by itself",
    ),
    _free(
        "locality_free_generation", "locality", heading="free, local.",
        meaning="share of answers that should stay that the model writes by itself",
    ),
)  # fmt: skip
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
    _strict(
        "multi_hop_strict_accuracy", "multi_hop", heading="strict, hops",
        meaning=f"questions over several hops of which {_EACH_PIECE} the answer is the most probable one",
    ),
    _free(
        "hop_accuracy", "hop", heading="hops", core=True,
        meaning="chains of which the model writes every single hop's answer",
    ),
    _strict(
        "hop_strict_accuracy", "hop", heading="strict, each hop",
        meaning=f"chains of which {_EACH_PIECE} every single hop's answer is the most probable one",
    ),
)  # fmt: skip
DIVERGENCE = (
    _kl(
        "neighbourhood_kl", "neighbourhood", heading="KL, neigh.", core=True,
        meaning=f"{_DIVERGENCE}, after prompts on other subjects",
    ),
    _kl("locality_kl", "locality", heading="KL, local.", core=True, meaning=f"{_DIVERGENCE}, after locality probes"),
)  # fmt: skip
OPINION = (
    Metric(
        "opinion", "paraphrase", pair=opinion, reads=("rivals",), core=True, bounds=UNIT,
        lacks="no replies of both kinds",
        meaning="how much likelier the new replies are than the old ones, if no less likely than before (SERAC's ES)",
    ),
)  # fmt: skip
