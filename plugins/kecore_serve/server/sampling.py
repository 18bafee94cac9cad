"""Choosing the next token of each row of a batch, by the settings of the text that the row writes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Choice", "Sampler", "Sampling", "choose_tokens"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a text is written.

    Args:
        max_tokens: most tokens to write.
        temperature: what logits are divided by before a token is drawn; 0 takes the most probable token.
        top_p: tokens are drawn from the most probable ones that hold this share of the probability.
        seed: of the draws; None for draws that nobody can repeat.
        stop: texts that end it, and do not belong to it.
        alternatives: how many of the most probable tokens are told for each token; None tells no probabilities.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    alternatives: int | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, and what the model thought of it.

    Args:
        token: its id.
        logprob: its log-probability in nats, before temperature and ``top_p``; None where it was not wanted.
        top: the most probable tokens with their log-probabilities, best first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Sampler:
    """Draws the tokens of one text, from a stream of random numbers of its own.

    Args:
        sampling: how the text is written.
        number: which of the texts of one request it is; texts of one seed differ by it.
    """

    sampling: Sampling
    number: int = 0
    stream: random.Random = field(init=False)

    def __post_init__(self) -> None:
        seed = self.sampling.seed
        self.stream = random.Random(None if seed is None else f"{seed} {self.number}")  # noqa: S311 - no secret


def choose_tokens(logits: Tensor, samplers: Sequence[Sampler]) -> list[Choice]:
    """Choose the next token of each row.

    Args:
        logits: ``[rows, vocab]``.
        samplers: one a row.
    """
    tokens = logits.argmax(-1)  # [rows]
    drawn = [row for row, sampler in enumerate(samplers) if sampler.sampling.temperature > 0]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        tokens[index] = _draw(logits[index], [samplers[row] for row in drawn])
    choices = [Choice(token) for token in tokens.tolist()]
    for row, sampler in enumerate(samplers):
        if sampler.sampling.alternatives is not None:
            choices[row] = _with_logprobs(logits[row], choices[row].token, sampler.sampling.alternatives)
    return choices


def _draw(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Draw a token a row by inverting the cumulative distribution, ``[rows]``."""
    temperatures = torch.tensor([[s.sampling.temperature] for s in samplers], dtype=torch.float64)  # [rows, 1]
    probabilities = (logits.double() / temperatures.to(logits.device)).softmax(-1)  # [rows, vocab]
    for row, sampler in enumerate(samplers):
        if sampler.sampling.top_p < 1:
            probabilities[row] = _nucleus(probabilities[row], sampler.sampling.top_p)
    cumulative = probabilities.cumsum(-1)
    uniform = torch.tensor([[s.stream.random()] for s in samplers], dtype=torch.float64)  # [rows, 1], below 1
    # In units of the whole mass, for `top_p` took some away. The first token whose cumulative mass lies above it:
    # never one of no mass, unlike with `<`.
    goal = uniform.to(logits.device) * cumulative[:, -1:]
    drawn = (cumulative <= goal).sum(-1)  # [rows]
    return drawn.clamp(max=logits.shape[-1] - 1)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Take the mass of all tokens away but of the most probable ones that together reach ``top_p``, ``[vocab]``."""
    ordered, ids = probabilities.sort(descending=True)
    before = ordered.cumsum(-1) - ordered  # mass of the more probable ones
    kept = torch.zeros_like(probabilities)
    is_kept = before < top_p
    is_kept[0] = True
    kept[ids[is_kept]] = ordered[is_kept]
    return kept


def _with_logprobs(logits: Tensor, token: int, alternatives: int) -> Choice:
    logprobs = logits.float().log_softmax(-1)  # [vocab]
    best = logprobs.topk(min(alternatives, len(logprobs)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Choice(token, float(logprobs[token]), top)
