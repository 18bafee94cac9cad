"""Inputs of a feed-forward block that an edit is not about, and coordinates in which its own are apart from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kecore.api.method import MethodContext
from kecore.engine.texts import load_passages
from kecore.model import ModelView
from kecore.text import Encoder
from kecore_methods.memory.neurons import Block, queries

__all__ = ["ROWS", "Scale", "at_tokens", "unrelated"]

ROWS = 8
"""Passages in a pass."""


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
        """That of some queries ``[n, d]``, with ``ridge`` times the mean variance added to each."""
        mean = queries.double().mean(0)
        apart = queries.double() - mean
        covariance = apart.t() @ apart / len(queries)
        covariance.diagonal().add_(ridge * covariance.diagonal().mean())
        return cls(mean.float(), torch.linalg.cholesky(covariance).float())

    def coordinates(self, queries: Tensor) -> Tensor:
        """``[n, d]`` of queries ``[n, d]``."""
        return torch.linalg.solve_triangular(self.factor, (queries - self.mean).t(), upper=False).t()

    def key(self, key: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Key ``[n, d]`` and bias ``[n]`` that read at queries what these read at their coordinates."""
        own = torch.linalg.solve_triangular(self.factor.t(), key.t(), upper=True).t()
        return own, bias - own @ self.mean


def unrelated(
    view: ModelView, context: MethodContext, block: Block, count: int, tokens: int, ridge: float
) -> tuple[Tensor, Scale]:
    """The block's input at every token of packaged passages, ``[tokens, d_in]``, and their scale; kept for later edits.

    Args:
        view: the model, frozen by the caller.
        context: of the edit.
        block: whose input.
        count: passages.
        tokens: of each passage.
        ridge: see :meth:`Scale.of`.
    """
    key = ("unrelated", block.layer, count, tokens, ridge)
    if key not in context.memo:
        encoder = Encoder(context.encoder.tokenizer)  # plain text, also where prompts are put into a template
        texts = [" ".join(part[:tokens]) for part in load_passages()[:count]]
        ids = [encoder.encode(text).ids[:tokens] for text in texts]
        found = torch.cat([at_tokens(view, encoder, ids[i : i + ROWS], block) for i in range(0, len(ids), ROWS)])
        context.memo[key] = found, Scale.of(found, ridge)
    return context.memo[key]


def at_tokens(view: ModelView, encoder: Encoder, ids: Sequence[Sequence[int]], block: Block) -> Tensor:
    """The block's input at the tokens of some texts, ``[tokens, d_in]``; the model is frozen by the caller."""
    rows = encoder.rows(ids)
    found = queries(view, rows, block)
    return found[rows.attention_mask.bool().to(found.device)]
