"""Micro-batches of token rows, in which what many rows begin with is run once.

That is an edit's facts, demonstrations, worked questions, a chat template. Which rows share it is found in their
tokens, so that nobody has to say where a prompt came from.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from kecore.api.errors import KecoreWarning
from kecore.inference.batching import micro_batches
from kecore.inference.opening import NO_OPENING, Opening, common_prefix
from kecore.memory import cached_share
from kecore.model.hooks import hooked
from kecore.model.verify import difference, rounding

if TYPE_CHECKING:
    from torch import Tensor

    from kecore.model import ModelView
    from kecore.text import Encoder, Rows

__all__ = ["group_by_prefix", "open_batches"]

_SHORT = 16  # tokens; fewer of them are not worth a cache
_PAYS = 0.25  # of a micro-batch that an opening has to spare: it costs a pass, and its rows are batched by themselves


def open_batches(
    view: ModelView,
    encoder: Encoder,
    rows: Sequence[Sequence[int]],
    keep: Sequence[int],
    costs: Sequence[int],
    budget: int,
    *,
    at_ends: bool = False,
) -> Iterator[tuple[Opening, list[int], Rows]]:
    """Group rows by what they begin with, and those of a group by length.

    The first opening is compared with passes over whole rows, and with ``at_ends`` each one, since padding may matter.
    A model that goes on from it in another way reads the rows that are left whole, and one with hooks reads all of them
    whole: what they do may depend on the whole prompt.

    Args:
        view: the model, frozen by the caller.
        encoder: pads.
        rows: token rows.
        keep: last tokens of each row that have to run with it, at least 1.
        costs: what each row costs on top of its padded tokens, in the same unit.
        budget: most that the padded tokens and costs of a micro-batch may be; see :func:`micro_batches`.
        at_ends: align rows at their last tokens instead of their first. Padding then stands behind the opening, which
            windows of attention take for tokens.

    Yields:
        An opening, the indices of a micro-batch's rows, and what follows the opening in each of them, padded.
    """
    heads = [row[: len(row) - kept] for row, kept in zip(rows, keep, strict=True)]
    left = dict.fromkeys(range(len(rows)))

    def batches(opening: Opening, members: list[int]) -> Iterator[tuple[Opening, list[int], Rows]]:
        cost = math.ceil(cached_share(view) * len(opening.ids))
        lengths = [len(rows[i]) - len(opening.ids) for i in members]
        for chosen in micro_batches(lengths, [costs[i] + cost for i in members], budget):
            batch = [members[k] for k in chosen]
            yield opening, batch, _padded(encoder, opening, [rows[i] for i in batch], at_ends)

    groups = group_by_prefix(heads, math.ceil(_PAYS * budget)) if view.left_padding and not hooked(view.model) else []
    for number, (length, members) in enumerate(groups if groups and view.continues else ()):
        opening = Opening.run(view, heads[members[0]][:length])
        compared = number == 0 or at_ends
        if compared and (reason := _differs(view, encoder, opening, [rows[i] for i in members], at_ends)):
            warnings.warn(
                f"{type(view.model).__name__} reads what prompts have in common anew for each of them: {reason}",
                KecoreWarning,
                stacklevel=4,
            )
            break
        yield from batches(opening, members)
        for index in members:
            del left[index]
    yield from batches(NO_OPENING, list(left))


def group_by_prefix(heads: Sequence[Sequence[int]], least: int) -> list[tuple[int, list[int]]]:
    """Groups of rows that begin alike, each with the number of tokens that its rows share.

    Rows that agree in more tokens are grouped first, by powers of two, so that what many rows share does not hide what
    fewer of them share beyond it.

    Args:
        heads: what may be shared of each row.
        least: tokens that a group has to spare, ``shared * (rows - 1)``; other rows are in no group.

    Examples:
        >>> alike([[*range(20), 50], [7, 8], [*range(20), 60]], 20)
        [(20, [0, 2])]
    """
    found: list[tuple[int, list[int]]] = []
    left = dict(enumerate(heads))
    length = 1 << max(map(len, heads), default=0).bit_length()
    while (length := length // 2) >= _SHORT:
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, head in left.items():
            if len(head) >= length:
                groups.setdefault(tuple(head[:length]), []).append(index)
        for members in groups.values():
            shared = len(common_prefix([left[index] for index in members]))
            if len(members) > 1 and shared * (len(members) - 1) >= least:
                found.append((shared, members))
                for index in members:
                    del left[index]
    return found


@torch.no_grad()
def _differs(view: ModelView, encoder: Encoder, opening: Opening, rows: Sequence[Sequence[int]], at_ends: bool) -> str:
    """Why an opening must not be used: a row ends in other logits behind it than it does whole.

    The shortest row, and where that is padded the longest, which says how far.
    """
    some = [min(rows, key=len), *([max(rows, key=len)] if at_ends else [])]
    found, wanted = (_last(view, _padded(encoder, before, some, at_ends), before) for before in (opening, NO_OPENING))
    error = difference(found, wanted)
    return f"logits behind it differ by {error:.1e}" if not error <= rounding(view, wanted.dtype) else ""


def _padded(encoder: Encoder, opening: Opening, rows: Sequence[Sequence[int]], at_ends: bool) -> Rows:
    """What follows an opening."""
    tails = [row[len(opening.ids) :] for row in rows]
    return encoder.rows(tails, [len(tail) - 1 for tail in tails] if at_ends else None)


def _last(view: ModelView, rows: Rows, opening: Opening) -> Tensor:
    """Logits behind the last token of each row."""
    return opening.logits_at(view, rows, torch.arange(len(rows.offset)), rows.ends - 1)
