"""The texts that a value is optimised on, and the places in them whose logits the loss reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kecore.batch import Located
from kecore.engine.replay import Replay

__all__ = ["LossRows", "Row"]


@dataclass(frozen=True, slots=True)
class Row:
    """A text of a micro-batch; the drawing in docs/concepts.md shows several, laid out.

    Args:
        group: index of its group in the micro-batch.
        located: its tokens, with the subject's last one.
        context: index of the context that it stands behind.
        is_kl: it asks what the subject is, and has no target: its next-token distribution is to stay.
    """

    group: int
    located: Located
    context: int = 0
    is_kl: bool = False

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens that are run: a target's last token is predicted, never read."""
        return self.located.ids if self.is_kl else self.located.ids[:-1]

    @property
    def columns(self) -> range:
        """The tokens whose logits count: those before each token of the target, or the last one."""
        if self.is_kl:
            return range(len(self.located.ids) - 1, len(self.located.ids))
        return range(self.located.start - 1, len(self.located.ids) - 1)


@dataclass(frozen=True, slots=True, eq=False)
class LossRows:
    """Rows of some groups, and the positions in them whose logits the loss reads.

    Args:
        replay: runs the rows.
        group: ``[rows]``, the group of each.
        context: ``[rows]``, index of its context; 0 for the bare prompt and for a row of the KL term.
        is_kl: ``[rows]``, true where a row stands for the KL term.
        row: ``[k]``, the row of each position, those of targets first.
        place: ``[k]``, the index of the position among its row's own tokens.
        token: ``[k]``, the target token to be predicted there; -1 on rows of the KL term.
        targets: how many of the positions are those of targets.
    """

    replay: Replay
    group: Tensor
    context: Tensor
    is_kl: Tensor
    row: Tensor
    place: Tensor
    token: Tensor
    targets: int

    @classmethod
    def of(cls, rows: Sequence[Row], replay: Replay, device: torch.device) -> LossRows:
        """Lay rows out as tensors; those with a target come first."""
        positions: list[tuple[int, int, int]] = []
        for index, row in enumerate(rows):
            for place in row.columns:
                token = -1 if row.is_kl else row.located.ids[place + 1]
                positions.append((index, place, token))
        row_index, place, token = torch.tensor(positions, device=device).t()  # [k] each
        return cls(
            replay,
            group=torch.tensor([row.group for row in rows], device=device),
            context=torch.tensor([row.context for row in rows], device=device),
            is_kl=torch.tensor([row.is_kl for row in rows], device=device),
            row=row_index,
            place=place,
            token=token,
            targets=int((token >= 0).sum()),
        )

    def select(self, mask: Tensor) -> LossRows:
        """Return the rows where ``mask [rows]`` is true, with their positions."""
        rows = mask.nonzero().flatten()  # [new rows]
        new_index = torch.full((len(mask),), -1, device=mask.device)  # [rows]
        new_index[rows] = torch.arange(len(rows), device=mask.device)
        stays = mask[self.row]  # [k]
        return LossRows(
            self.replay.select(rows),
            group=self.group[rows],
            context=self.context[rows],
            is_kl=self.is_kl[rows],
            row=new_index[self.row[stays]],
            place=self.place[stays],
            token=self.token[stays],
            targets=int(stays[: self.targets].sum()),
        )
