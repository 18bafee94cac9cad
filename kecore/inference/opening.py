"""Tokens that many rows begin with, run once for all of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kecore.text import Rows

if TYPE_CHECKING:
    from kecore.model.view import ModelView

__all__ = ["NO_OPENING", "Opening", "common_prefix"]


class Opening:
    """What rows begin with, as keys and values of the attention; the model runs on what follows.

    Args:
        ids: its tokens.
        cache: the model's cache of one row that holds them; None if there are none.
    """

    def __init__(self, ids: Sequence[int] = (), cache: Any = None) -> None:
        self.ids = tuple(ids)
        self.cache = cache

    @classmethod
    @torch.no_grad()
    def run(cls, view: ModelView, ids: Sequence[int]) -> Opening:
        """Run the tokens on a model that :attr:`~kecore.model.ModelView.continues`."""
        row = torch.tensor([list(ids)])  # [1, opening]
        rows = Rows(row, torch.ones_like(row), torch.zeros(1, dtype=torch.long))
        first = torch.zeros(1, dtype=torch.long)  # nobody needs logits: take those of one token, the fewest there are
        return cls(ids, view.run(rows, at=(first, first), use_cache=True).cache)

    def before(self, rows: Rows) -> tuple[Any, Tensor] | None:
        """Return what ``ModelView.run(past=...)`` takes for rows that follow: their own cache, and the whole mask.

        Positions leave out padding that stands between the opening and a row's tokens.
        """
        if not self.ids:
            return None
        mask = rows.attention_mask
        cache = copy.deepcopy(self.cache)
        # Row 0 of the cache is its only one: every row that follows gets a copy of it.
        cache.reorder_cache(torch.zeros(len(mask), dtype=torch.long, device=mask.device))
        # The opening has no padding: its part of the mask is all ones. [rows, opening + width]
        return cache, torch.cat([mask.new_ones(len(mask), len(self.ids)), mask], dim=1)

    def logits_at(self, view: ModelView, rows: Rows, row: Tensor, column: Tensor) -> Tensor:
        """Return logits ``[k, vocab]`` of rows behind this opening; see :meth:`kecore.model.ModelView.logits_at`."""
        rows = rows.to(view.device)
        return view.logits_at(rows, row, column, self.before(rows))


NO_OPENING = Opening()
"""The opening of rows that have nothing in common."""


def common_prefix(rows: Sequence[Sequence[int]]) -> list[int]:
    """Return the longest sequence of tokens that all rows begin with."""
    prefix: list[int] = []
    for tokens in zip(*rows, strict=False):  # one column of all rows, up to the end of the shortest
        if len(set(tokens)) > 1:
            break
        prefix.append(tokens[0])
    return prefix
