"""Metrics that hold an answer against several others: multiple choice, and TOFU's truth ratio."""

from __future__ import annotations

import math
from functools import partial
from statistics import fmean

from kecore.evaluate import AnsweredProbe, Metric, Protocol
from kecore.evaluate.metrics import UNIT, log_probability

__all__ = ["CHOICE", "TRUTH_RATIO", "choice", "truth_ratio"]

_LARGEST = 709.0
"""Nats beyond which ``exp`` overflows."""


def choice(probe: AnsweredProbe, protocol: Protocol) -> float | None:
    """Return 1 if the likeliest right answer is more probable than every rival, else 0; a tie is 0.

    Returns:
        None where a probe has no answer or no rival.
    """
    if not probe.scores or not probe.rival_scores:
        return None
    best_answer = max(log_probability(score, protocol) for score in probe.scores)
    best_rival = max(log_probability(score, protocol) for score in probe.rival_scores)
    return float(best_answer > best_rival)


def truth_ratio(probe: AnsweredProbe, protocol: Protocol) -> float | None:
    """Return how much likelier wrong answers are than the true one (TOFU, arXiv 2401.06121, section 2.2.2).

    The mean over the wrong answers of their probability per token, through that of the true answer, which is the first
    rival of a probe without a right answer.

    Returns:
        A number of at least 0; None for other probes, and where it is too large for a number.
    """
    if probe.answers or len(probe.rival_scores) < 2:
        return None
    true_answer, *wrong_answers = probe.rival_scores
    differences = [wrong.mean - true_answer.mean for wrong in wrong_answers]
    if not all(difference < _LARGEST for difference in differences):  # nor where a model's logits are not finite
        return None
    return fmean(map(math.exp, differences))


_choice = partial(Metric, measure=choice, reads=("rivals",), bounds=UNIT, lacks="no answer with others beside it")

CHOICE = (
    _choice(
        "portability_choice", "portability", heading="choice, portab.",
        meaning="the right answer to what follows from the edit is more probable than every other choice",
    ),
    _choice(
        "locality_choice", "locality", heading="choice, local.",
        meaning="the answer that should stay is more probable than every other choice",
    ),
)  # fmt: skip
TRUTH_RATIO = Metric(
    "truth_ratio",
    "portability",
    measure=truth_ratio,
    reads=("rivals",),
    bounds=(0.0, math.inf),
    lacks="no true answer with wrong ones beside it",
    meaning="probability of wrong answers through that of the true one: near 0 where the fact is known (TOFU)",
)
