"""Log-probabilities of continuations, batched.

The unit is a pair (prompt, continuation). Its *context*, the tokens before the last one, goes through the
model once however many pairs share it: CounterFact asks two answers after one prompt, and where both are
a single token their contexts are the same row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kecore.api.errors import RequestError
from kecore.api.progress import Progress, silent
from kecore.edit import Reader, written
from kecore.inference.openings import open_batches

if TYPE_CHECKING:
    from kecore.model import ModelView
    from kecore.text import Encoder

__all__ = ["BATCH_TOKENS", "ContinuationScore", "next_tokens", "score_continuations", "score_tokens"]

BATCH_TOKENS = 2048
"""Padded tokens of one micro-batch; a number of speed and memory, never of the result."""

_LOGITS_COST = 8
"""What one row of logits counts in tokens: it is the widest tensor of a forward pass (vocab floats)."""


@dataclass(frozen=True, slots=True)
class ContinuationScore:
    """How a model rates one continuation of one prompt, under teacher forcing.

    Args:
        log_probs: natural-log probability of each of its tokens, given the prompt and those before.
            Minus infinity where the model's logits are not finite.
        ids: its token ids.
        argmax: the model's most probable token in each place; -1 where the logits are not finite.
    """

    log_probs: tuple[float, ...]
    ids: tuple[int, ...]
    argmax: tuple[int, ...]

    @property
    def total(self) -> float:
        """Log-probability of the continuation."""
        return math.fsum(self.log_probs)

    @property
    def mean(self) -> float:
        """Log-probability per token: minus the mean NLL of the official CounterFact code."""
        return self.total / len(self.log_probs)

    @property
    def correct(self) -> tuple[bool, ...]:
        """Whether each token is the model's most probable one."""
        return tuple(a == b for a, b in zip(self.ids, self.argmax, strict=True))

    @property
    def accuracy(self) -> float:
        """Share of correct tokens: EasyEdit's teacher-forced accuracy."""
        return sum(self.correct) / len(self.ids)

    @property
    def exact(self) -> bool:
        """All tokens are correct: strict accuracy."""
        return all(self.correct)


def score_continuations(
    view: ModelView,
    encoder: Encoder,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
) -> list[ContinuationScore]:
    """Score continuations of prompts with the model as it is now.

    Log-probabilities are taken in float32 (float64 for a float64 model). Equal pairs, and pairs with equal
    contexts, are computed once. The result depends on neither padding nor the other pairs beyond the
    rounding of the model's own matrix products.

    Args:
        view: the model.
        encoder: decides spaces, special tokens and template.
        pairs: ``(prompt, continuation)``.
        batch_tokens: padded tokens of one micro-batch.
        progress: called after each micro-batch.

    Returns:
        One score a pair, in order.

    Raises:
        RequestError: a continuation has no tokens, or nothing stands before it.
    """
    unique = list(dict.fromkeys(pairs))
    read = written(view.model, [prompt for prompt, _ in unique], Reader(view, encoder))
    encoded = {pair: encoder.encode(text, pair[1]) for pair, text in zip(unique, read, strict=True)}
    for pair, item in encoded.items():
        if not 0 < item.start < len(item.ids):
            raise RequestError(f"a continuation is scored after a prompt and both need tokens, got {pair!r}")
    rows = list(dict.fromkeys((item.ids, item.start) for item in encoded.values()))
    scores = dict(zip(rows, score_tokens(view, encoder, rows, batch_tokens, progress), strict=True))
    return [scores[encoded[pair].ids, encoded[pair].start] for pair in pairs]


def score_tokens(
    view: ModelView,
    encoder: Encoder,
    rows: Sequence[tuple[tuple[int, ...], int]],
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
) -> list[ContinuationScore]:
    """Score the ends of token rows; equal contexts are run once.

    Args:
        view: the model.
        encoder: pads.
        rows: token ids, and the index of the first that is scored, at least 1.
        batch_tokens: padded tokens of one micro-batch.
        progress: called after each micro-batch.

    Returns:
        One score a row, in order.
    """
    contexts: dict[tuple[int, ...], list[int]] = {}
    for i, (ids, _) in enumerate(rows):
        contexts.setdefault(ids[:-1], []).append(i)
    texts = list(contexts)
    # Rows of one context ask for its last places; the longest continuation asks for the most.
    firsts = [min(rows[i][1] for i in contexts[text]) for text in texts]
    places = [len(text) + 1 - first for text, first in zip(texts, firsts, strict=True)]
    scores: dict[int, ContinuationScore] = {}
    done = 0
    with view.frozen():
        for batch, logits in _logits(view, encoder, texts, places, batch_tokens):
            begins = itertools.accumulate((places[k] for k in batch), initial=0)
            own = [
                (i, begin + rows[i][1] - firsts[k], rows[i][0][rows[i][1] :])
                for k, begin in zip(batch, begins, strict=False)
                for i in contexts[texts[k]]
            ]
            found = _scores(logits, [(begin, ids) for _, begin, ids in own])
            scores.update(zip((i for i, _, _ in own), found, strict=True))
            done += len(batch)
            progress("score", done, len(texts))
    return [scores[i] for i in range(len(rows))]


def next_tokens(
    view: ModelView,
    encoder: Encoder,
    prompts: Sequence[str],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
) -> list[Tensor]:
    """What a model says after prompts: one distribution each, natural-log probabilities ``[vocab]`` in main memory.

    float32, or float64 for a float64 model.
    """
    names = list(dict.fromkeys(prompts))
    ids = [encoder.encode(text).ids for text in written(view.model, names, Reader(view, encoder))]
    found: dict[str, Tensor] = {}
    with view.frozen():
        for batch, logits in _logits(view, encoder, ids, [1] * len(ids), batch_tokens):
            values = logits.log_softmax(-1).cpu()
            found.update((names[i], value.clone()) for i, value in zip(batch, values, strict=True))
            progress("distributions", len(found), len(names))
    return [found[prompt] for prompt in prompts]


def _logits(
    view: ModelView, encoder: Encoder, texts: Sequence[tuple[int, ...]], places: Sequence[int], batch_tokens: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Logits of the last ``places[i]`` columns of each text ``i``.

    Yields:
        The texts of a micro-batch, and their logits one after another, ``[sum, vocab]``.
    """
    # Columns that are asked for have to run with their text.
    costs = [_LOGITS_COST * n for n in places]
    for opening, batch, padded in open_batches(view, encoder, texts, places, costs, batch_tokens):
        asked = [places[i] for i in batch]
        row = torch.repeat_interleave(torch.arange(len(batch)), torch.tensor(asked))
        column = torch.cat([torch.arange(end - n, end) for end, n in zip(padded.ends.tolist(), asked, strict=True)])
        logits = opening.logits_at(view, padded, row, column)
        yield batch, logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _scores(logits: Tensor, asked: Sequence[tuple[int, tuple[int, ...]]]) -> list[ContinuationScore]:
    """Score continuations: token ids whose first token is predicted by row ``begin`` of the logits."""
    norm = logits.logsumexp(-1)
    broken = ~norm.isfinite()
    argmax = logits.argmax(-1).masked_fill(broken, -1).tolist()
    place = torch.tensor([begin + k for begin, ids in asked for k in range(len(ids))])
    token = torch.tensor([id for _, ids in asked for id in ids])
    place, token = place.to(logits.device), token.to(logits.device)
    picked = (logits[place, token] - norm[place]).masked_fill(broken[place], -math.inf)
    log_probs = iter(picked.tolist())
    return [
        ContinuationScore(tuple(itertools.islice(log_probs, len(ids))), ids, tuple(argmax[begin : begin + len(ids)]))
        for begin, ids in asked
    ]
