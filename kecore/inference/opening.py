"""Tokens that many rows begin with, run once for all of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import takewhile
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
        row = torch.tensor([list(ids)])
        rows = Rows(row, torch.ones_like(row), torch.zeros(1, dtype=torch.long))
        one = torch.zeros(1, dtype=torch.long)  # nobody needs logits here
        return cls(ids, view.forward(rows, at=(one, one), use_cache=True).cache)

    def before(self, rows: Rows) -> tuple[Any, Tensor] | None:
        """What ``ModelView.forward(past=...)`` takes for rows that follow: a cache of their own, and the whole mask.

        Positions leave out padding that stands between the opening and a row's tokens.
        """
        if not self.ids:
            return None
        mask = rows.attention_mask
        cache = copy.deepcopy(self.cache)
        cache.reorder_cache(torch.zeros(len(mask), dtype=torch.long, device=mask.device))
        return cache, torch.cat([mask.new_ones(len(mask), len(self.ids)), mask], dim=1)

    def logits_at(self, view: ModelView, rows: Rows, row: Tensor, column: Tensor) -> Tensor:
        """Logits ``[k, vocab]`` of rows that follow this opening; see :meth:`kecore.model.ModelView.logits_at`."""
        rows = rows.to(view.device)
        return view.logits_at(rows, row, column, self.before(rows))


NO_OPENING = Opening()
"""The opening of rows that have nothing in common."""


def common_prefix(rows: Sequence[Sequence[int]]) -> list[int]:
    """The longest sequence that all of these begin with."""
    return [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))]
