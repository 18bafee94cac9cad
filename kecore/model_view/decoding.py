"""Writing on from token rows, one token a row at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from kecore.text import Rows

if TYPE_CHECKING:
    from kecore.model_view.view import ModelView

__all__ = ["Decoding"]


class Decoding:
    """Token rows that grow at their end, with a key-value cache where the model keeps one.

    Args:
        view: the model, frozen by the caller.
        rows: rows that all end in the last column.
    """

    def __init__(self, view: ModelView, rows: Rows) -> None:
        self.view = view
        self.rows = self._step = rows.to(view.device)
        self._past: tuple[Any, Tensor] | None = None
        self._cache: Any = None

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Logits of the next token of every row, ``[rows, vocab]``."""
        every = torch.arange(len(self._step.input_ids), device=self.view.device)
        last = torch.full_like(every, self._step.input_ids.shape[1] - 1)
        out = self.view.forward(self._step, at=(every, last), past=self._past, use_cache=True)
        self._cache = out.cache
        return cast("Tensor", out.logits)

    def append(self, token: Tensor) -> None:
        """Let every row go on with a token, ``[rows]``."""
        token = token.to(self.view.device)
        new = Rows(token[:, None], torch.ones_like(token)[:, None], torch.zeros_like(token))
        ids, mask = self.rows.input_ids, self.rows.attention_mask
        self.rows = Rows(
            torch.cat([ids, new.input_ids], -1), torch.cat([mask, new.attention_mask], -1), self.rows.offset
        )
        # A model without a key-value cache reads the grown rows again.
        cached = self._cache is not None
        self._step, self._past = (new, (self._cache, self.rows.attention_mask)) if cached else (self.rows, None)
