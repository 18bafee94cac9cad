"""Writing on from token rows, one token a row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from kecore.inference.opening import NO_OPENING, Opening
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
        """Logits of the next token of every row, ``[rows, vocab]``."""
        every = torch.arange(len(self._step.input_ids), device=self.view.device)
        last = torch.full_like(every, self._step.input_ids.shape[1] - 1)
        out = self.view.forward(self._step, at=(every, last), past=self._past, use_cache=True)
        self._cache = out.cache
        return cast("Tensor", out.logits)

    def append(self, token: Tensor, going: Sequence[bool] | None = None) -> None:
        """Let every row go on with a token.

        Args:
            token: ``[rows]``.
            going: which rows do go on; the others get padding, of which a row can take more than its context holds.
        """
        token = token.to(self.view.device)
        one, step = torch.ones_like(token)[:, None], self._step
        if going is not None:
            one *= torch.tensor(going, device=token.device)[:, None]
        if self._cache is None:  # a model without a key-value cache reads the grown rows again
            ids, mask = (step.input_ids, token[:, None]), (step.attention_mask, one)
            self._step = Rows(torch.cat(ids, -1), torch.cat(mask, -1), step.offset)
            return
        before = step.attention_mask if self._past is None else self._past[1]
        self._step = Rows(token[:, None], one, torch.zeros_like(token))
        self._past = self._cache, torch.cat([before, one], -1)

    def keep(self, rows: Sequence[int]) -> bool:
        """Go on with these rows alone, if that cannot change what they say and is worth a copy of the cache.

        Returns:
            Whether it was done. Not over a cache that rows cannot be taken out of, nor with hooks, which may hold
            something for each row.
        """
        step, index = self._step, torch.tensor(rows, device=self.view.device)
        if self._past is None:  # no cache: rows are read again in any case
            step = step.select(index)
            first = int(step.attention_mask.any(0).int().argmax())
            self._step = Rows(step.input_ids[:, first:], step.attention_mask[:, first:], step.offset - first)
            return True
        few = len(rows) <= _COMPACT * len(step.input_ids)
        if not few or hooked(self.view.model) or not self.view.drops_rows:
            return False
        cache, mask = self._past
        cache.reorder_cache(index)
        self._step, self._past = step.select(index), (cache, mask[index])
        return True
