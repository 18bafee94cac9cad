"""Inputs of a feed-forward block that an edit is not about, and coordinates that tell the edit's own inputs apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kecore.api.method import MethodContext
from kecore.engine.texts import load_passages
from kecore.model import ModelView
from kecore.text import Encoder
from kecore_methods.memory.neurons import Block, read_queries

__all__ = ["ROWS", "Scale", "Unrelated", "read_token_queries", "unrelated_queries"]

ROWS = 8
"""Passages that one pass reads."""


@dataclass(frozen=True)
class Scale:
    """Queries with their mean taken off and their covariance divided out.

    Queries of a block have most of their length in common, so that a key like one of them reads nearly the same at
    all. In these coordinates unrelated ones are about orthogonal to each other.

    Args:
        mean: ``[d]``.
        factor: ``[d, d]``, lower Cholesky factor of the covariance.
    """

    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, queries: Tensor, ridge: float) -> Scale:
        """Return the scale of queries ``[n, d]``; ``ridge`` times the mean variance is added to each variance."""
        mean = queries.double().mean(0)
        centred = queries.double() - mean
        covariance = centred.t() @ centred / len(queries)  # [d, d]
        covariance.diagonal().add_(ridge * covariance.diagonal().mean())
        return cls(mean.float(), torch.linalg.cholesky(covariance).float())

    def coordinates(self, queries: Tensor) -> Tensor:
        """Return the coordinates ``L⁻¹ (q - mean)`` of queries, ``[n, d]``."""
        return torch.linalg.solve_triangular(self.factor, (queries - self.mean).t(), upper=False).t()

    def key(self, key: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return key ``[n, d]`` and bias ``[n]`` that read at queries what the given ones read at their coordinates."""
        query_key = torch.linalg.solve_triangular(self.factor.t(), key.t(), upper=True).t()  # L⁻ᵀ k
        return query_key, bias - query_key @ self.mean


@dataclass(frozen=True)
class Unrelated:
    """Inputs of a block at packaged passages.

    Args:
        queries: ``[tokens, d_in]``.
        scale: their mean and covariance.
    """

    queries: Tensor
    scale: Scale


def unrelated_queries(
    view: ModelView, context: MethodContext, block: Block, *, passages: int, tokens: int, ridge: float
) -> Unrelated:
    """Return the block's inputs at every token of packaged passages; read once for all edits of a session.

    Args:
        view: the model, frozen by the caller.
        context: of the edit.
        block: the feed-forward block.
        passages: number of passages.
        tokens: tokens of each passage.
        ridge: see :meth:`Scale.of`.
    """
    key = ("unrelated", block.layer, passages, tokens, ridge)
    if key not in context.memo:
        encoder = Encoder(context.encoder.tokenizer)  # plain text, also where prompts are put into a template
        texts = [" ".join(words[:tokens]) for words in load_passages()[:passages]]
        ids = [encoder.encode(text).ids[:tokens] for text in texts]
        chunks = [read_token_queries(view, encoder, ids[i : i + ROWS], block) for i in range(0, len(ids), ROWS)]
        queries = torch.cat(chunks)  # [tokens, d_in]
        context.memo[key] = Unrelated(queries, Scale.of(queries, ridge))
    return context.memo[key]


def read_token_queries(view: ModelView, encoder: Encoder, ids: Sequence[Sequence[int]], block: Block) -> Tensor:
    """Return the block's inputs at the tokens of some texts, ``[tokens, d_in]``; the model is frozen by the caller."""
    rows = encoder.rows(ids)
    queries = read_queries(view, rows, block)  # [rows, width, d_in]
    return queries[view.tokens_read(rows).to(queries.device)]
