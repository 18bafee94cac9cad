"""The state of a loop that generates text: token rows that grow by one token each at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kecore.inference.opening import NO_OPENING, Opening
from kecore.model.caches import join_caches, shift_cache
from kecore.model.hooks import hooked
from kecore.text import Rows

if TYPE_CHECKING:
    from kecore.model.view import ModelView

__all__ = ["Decoding"]

_COMPACT = 0.75  # rows are gathered anew once a quarter of them has ended


class Decoding:
    """Token rows that grow at their end, with a key-value cache where the model keeps one.

    Args:
        view: the model, frozen by the caller.
        rows: rows that all end in the last column.
        opening: what stands before all of them.
    """

    def __init__(self, view: ModelView, rows: Rows, opening: Opening = NO_OPENING) -> None:
        self.view = view
        self._step = rows.to(view.device)
        self._past = opening.before(self._step)
        self._cache: Any = None

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Run the model and return the logits of the next token of every row, ``[rows, vocab]``."""
        row = torch.arange(len(self._step.input_ids), device=self.view.device)
        last = torch.full_like(row, self._step.input_ids.shape[1] - 1)  # all rows end in the last column
        out = self.view.run(self._step, at=(row, last), past=self._past, use_cache=True)
        self._cache = out.cache
        return out.logits

    def append(self, token: Tensor, going: Sequence[bool] | None = None) -> None:
        """Let every row go on with a token.

        Args:
            token: ``[rows]``.
            going: which rows do go on; the others get padding, of which a row can take more than its context holds.
        """
        token = token.to(self.view.device)
        column = token[:, None]  # [rows, 1]
        column_mask = torch.ones_like(column)
        if going is not None:
            column_mask *= torch.tensor(going, device=token.device)[:, None]
        step = self._step
        if self._cache is None:  # a model without a key-value cache reads the grown rows again
            input_ids = torch.cat([step.input_ids, column], dim=-1)
            attention_mask = torch.cat([step.attention_mask, column_mask], dim=-1)
            self._step = Rows(input_ids, attention_mask, step.offset)
            return
        past_mask = step.attention_mask if self._past is None else self._past[1]
        self._step = Rows(column, column_mask, torch.zeros_like(token))
        self._past = self._cache, torch.cat([past_mask, column_mask], dim=-1)

    def keep(self, rows: Sequence[int]) -> bool:
        """Drop all other rows, if that cannot change what these say and is worth a copy of the cache.

        Returns:
            Whether it was done. Not over a cache that rows cannot be taken out of, nor with hooks, which may hold
            something for each row.
        """
        step = self._step
        index = torch.tensor(rows, device=self.view.device)
        if self._past is None:  # no cache: rows are read again in any case
            step = step.select(index)
            first = int(step.attention_mask.any(0).int().argmax())  # first column that is not padding in every row
            self._step = Rows(step.input_ids[:, first:], step.attention_mask[:, first:], step.offset - first)
            return True
        worthwhile = len(rows) <= _COMPACT * len(step.input_ids)
        if not worthwhile or hooked(self.view.model) or not self.view.drops_rows:
            return False
        cache, mask = self._past
        cache.reorder_cache(index)
        self._step, self._past = step.select(index), (cache, mask[index])
        return True

    @property
    def width(self) -> int:
        """Columns that the next pass looks at, padding included."""
        return int((self._step.attention_mask if self._past is None else self._past[1]).shape[1])

    def join(self, other: Decoding) -> bool:
        """Take in the rows of another loop below the own ones, if that cannot change what either of them says.

        Both have to stand behind :meth:`append`. Columns that are padding in every row then are dropped.

        Args:
            other: a loop over the same model; it is spent if it was taken in.

        Returns:
            Whether it was done. Not without a cache or over one that cannot be joined, nor with hooks, which may hold
            something for each row.
        """
        if self._past is None or other._past is None or hooked(self.view.model) or not self.view.joins_rows:
            return False
        (cache, mask), (other_cache, other_mask) = self._past, other._past
        if not join_caches(cache, other_cache):
            return False
        width = max(mask.shape[1], other_mask.shape[1])  # what the caches hold, and the tokens that are read next
        mask = torch.cat([pad(mask, (width - mask.shape[1], 0)), pad(other_mask, (width - other_mask.shape[1], 0))])
        dead = int(mask.any(0).int().argmax())  # columns before the first one that a row needs
        if dead:
            shift_cache(cache, -dead)
        step, other_step = self._step, other._step
        self._step = Rows(
            torch.cat([step.input_ids, other_step.input_ids]),
            torch.cat([step.attention_mask, other_step.attention_mask]),
            torch.cat([step.offset, other_step.offset]),
        )
        self._past = cache, mask[:, dead:]
        return True
