"""The same token rows with all padding on the right, for models in which padding before the tokens matters."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kecore.model.sites import Start

if TYPE_CHECKING:
    from kecore.text import Rows

__all__ = ["RightPadding"]


class RightPadding:
    """Rotate each row's columns by its offset, and back.

    Args:
        rows: token rows with padding on either side.
    """

    def __init__(self, rows: Rows) -> None:
        self.offset = rows.offset
        width = rows.input_ids.shape[1]
        offset = rows.offset.cpu()[:, None]  # [rows, 1]
        self._to_right = (torch.arange(width) + offset) % width  # [rows, width]
        self._to_left = (torch.arange(width) - offset) % width  # [rows, width]

    def to_right(self, x: Tensor) -> Tensor:
        """Rotate ``[rows, width, ...]`` so that the tokens come first."""
        return x[torch.arange(len(x))[:, None], self._to_right]

    def to_left(self, x: Tensor) -> Tensor:
        """Undo :meth:`to_right`."""
        return x[torch.arange(len(x))[:, None], self._to_left]

    def rows(self, rows: Rows) -> Rows:
        """Return the token rows with the tokens first."""
        return replace(
            rows,
            input_ids=self.to_right(rows.input_ids),
            attention_mask=self.to_right(rows.attention_mask),
            offset=torch.zeros_like(rows.offset),
        )

    def start(self, start: Start | None) -> Start | None:
        """Return where the pass begins, its hidden state rotated as the rows are."""
        return None if start is None else Start(start.layer, self.to_right(start.hidden))

    def places(self, at: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """Return ``(row [k], column [k])`` with the columns that these tokens have in the rotated rows."""
        if at is None:
            return None
        row, column = at
        return row, column - self.offset.to(row.device)[row]
