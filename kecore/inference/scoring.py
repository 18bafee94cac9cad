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
        argmax: the model's most probable token in the place of each; -1 where the logits are not finite.
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
        return tuple(token == predicted for token, predicted in zip(self.ids, self.argmax, strict=True))

    @property
    def accuracy(self) -> float:
        """Share of correct tokens: EasyEdit's teacher-forced accuracy."""
        return self.correct.count(True) / len(self.ids)

    @property
    def exact(self) -> bool:
        """Whether all tokens are correct: strict accuracy."""
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
    prompts = written(view.model, [prompt for prompt, _ in unique], Reader(view, encoder))  # as edits rewrite them
    row_of_pair: dict[tuple[str, str], tuple[tuple[int, ...], int]] = {}
    for pair, prompt in zip(unique, prompts, strict=True):
        encoded = encoder.encode(prompt, pair[1])
        if not 0 < encoded.start < len(encoded.ids):
            raise RequestError(f"a continuation is scored after a prompt and both need tokens, got {pair!r}")
        row_of_pair[pair] = (encoded.ids, encoded.start)
    rows = list(dict.fromkeys(row_of_pair.values()))
    scores = dict(zip(rows, score_tokens(view, encoder, rows, batch_tokens, progress), strict=True))
    return [scores[row_of_pair[pair]] for pair in pairs]


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
    contexts = _group_by_context(rows)
    columns = [context.columns for context in contexts]
    scores: dict[int, ContinuationScore] = {}
    done = 0
    with view.frozen():
        for batch, logits in _logits(view, encoder, [context.ids for context in contexts], columns, batch_tokens):
            pieces: list[_Piece] = []
            begin = 0  # row of `logits` that stands for the first column a context asks for
            for index in batch:
                context = contexts[index]
                for row in context.rows:
                    ids, start = rows[row]
                    pieces.append(_Piece(row, begin + start - context.first, ids[start:]))
                begin += context.columns
            scores.update(_scores(logits, pieces))
            done += len(batch)
            progress("score", done, len(contexts))
    return [scores[row] for row in range(len(rows))]


@dataclass(slots=True)
class _Context:
    """Tokens that one or more rows have before their last one, and that the model reads once for all of them.

    Args:
        ids: the tokens.
        first: lowest index of a token that one of the rows is scored from.
        rows: indices of the rows.
    """

    ids: tuple[int, ...]
    first: int
    rows: list[int]

    @property
    def columns(self) -> int:
        """How many of the last columns have to give logits: the longest continuation asks for the most."""
        return len(self.ids) + 1 - self.first


@dataclass(frozen=True, slots=True)
class _Piece:
    """The continuation of one row, in the logits of a micro-batch.

    Args:
        row: index of the row.
        begin: row of the logits that predicts the first token; the next ones follow it.
        ids: the continuation's tokens.
    """

    row: int
    begin: int
    ids: tuple[int, ...]


def _group_by_context(rows: Sequence[tuple[tuple[int, ...], int]]) -> list[_Context]:
    """Bring together the rows that agree in all tokens but the last."""
    contexts: dict[tuple[int, ...], _Context] = {}
    for row, (ids, start) in enumerate(rows):
        context = contexts.setdefault(ids[:-1], _Context(ids[:-1], start, []))
        context.first = min(context.first, start)
        context.rows.append(row)
    return list(contexts.values())


def next_tokens(
    view: ModelView,
    encoder: Encoder,
    prompts: Sequence[str],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
) -> list[Tensor]:
    """Return the distribution of the next token after each prompt.

    Args:
        view: the model.
        encoder: decides special tokens and template.
        prompts: equal prompts are run once.
        batch_tokens: padded tokens of one micro-batch.
        progress: called after each micro-batch.

    Returns:
        One tensor of natural-log probabilities a prompt, ``[vocab]``, in main memory; float32, or float64 for a
        float64 model.
    """
    unique = list(dict.fromkeys(prompts))
    ids = [encoder.encode(text).ids for text in written(view.model, unique, Reader(view, encoder))]
    distributions: dict[str, Tensor] = {}
    with view.frozen():
        for batch, logits in _logits(view, encoder, ids, [1] * len(ids), batch_tokens):
            log_probs = logits.log_softmax(-1).cpu()  # [rows of the batch, vocab]
            for index, row in zip(batch, log_probs, strict=True):
                distributions[unique[index]] = row.clone()  # a view would keep the whole batch
            progress("distributions", len(distributions), len(unique))
    return [distributions[prompt] for prompt in prompts]


def _logits(
    view: ModelView, encoder: Encoder, texts: Sequence[tuple[int, ...]], columns: Sequence[int], batch_tokens: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Compute logits of the last ``columns[i]`` columns of each text ``i``.

    Yields:
        The indices of a micro-batch's texts, and their logits one text after another: ``[sum of columns, vocab]``.
    """
    costs = [_LOGITS_COST * count for count in columns]
    # A column whose logits are wanted has to run with its text, not with the opening: `columns` is what is kept.
    for opening, batch, padded in open_batches(view, encoder, texts, columns, costs, batch_tokens):
        row_indices: list[Tensor] = []
        column_indices: list[Tensor] = []
        for row, (index, end) in enumerate(zip(batch, padded.ends.tolist(), strict=True)):
            row_indices.append(torch.full((columns[index],), row))
            column_indices.append(torch.arange(end - columns[index], end))
        logits = opening.logits_at(view, padded, torch.cat(row_indices), torch.cat(column_indices))
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        yield batch, logits


def _scores(logits: Tensor, pieces: Sequence[_Piece]) -> dict[int, ContinuationScore]:
    """Score continuations by the logits ``[n, vocab]`` of their micro-batch.

    Returns:
        The score of each row, by the row's index.
    """
    normaliser = logits.logsumexp(-1)  # [n]
    broken = ~normaliser.isfinite()  # [n]: the logits of these rows overflowed
    argmax = logits.argmax(-1).masked_fill(broken, -1).tolist()  # n tokens
    positions: list[int] = []
    tokens: list[int] = []
    for piece in pieces:
        positions += range(piece.begin, piece.begin + len(piece.ids))
        tokens += piece.ids
    position = torch.tensor(positions, device=logits.device)  # [t], t tokens of all continuations
    token = torch.tensor(tokens, device=logits.device)  # [t]
    log_prob = (logits[position, token] - normaliser[position]).masked_fill(broken[position], -math.inf)  # [t]
    remaining = iter(log_prob.tolist())
    scores: dict[int, ContinuationScore] = {}
    for piece in pieces:
        count = len(piece.ids)
        predicted = tuple(argmax[piece.begin : piece.begin + count])
        scores[piece.row] = ContinuationScore(tuple(itertools.islice(remaining, count)), piece.ids, predicted)
    return scores
