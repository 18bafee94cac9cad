"""Micro-batches of token rows, in which what many rows begin with is run once.

Rows share the facts that a prompt edit puts before them, demonstrations, worked questions, or a chat template. Which
rows share what is found in their tokens, so that nobody has to say where a prompt came from.
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
_PAYS = 0.25  # least share of a micro-batch that an opening spares: it costs a pass, and its rows are batched apart


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
    """Group rows by what they begin with, and the rows of a group into micro-batches by length.

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
    # The part of each row that may be run as an opening.
    heads = [row[: len(row) - count] for row, count in zip(rows, keep, strict=True)]
    ungrouped = dict.fromkeys(range(len(rows)))  # a set that keeps the order

    def batches(opening: Opening, members: list[int]) -> Iterator[tuple[Opening, list[int], Rows]]:
        opening_cost = math.ceil(cached_share(view) * len(opening.ids))
        lengths = [len(rows[index]) - len(opening.ids) for index in members]
        member_costs = [costs[index] + opening_cost for index in members]
        for positions in micro_batches(lengths, member_costs, budget):
            batch = [members[position] for position in positions]
            yield opening, batch, _pad_tails(encoder, opening, [rows[index] for index in batch], at_ends)

    groups: list[tuple[int, list[int]]] = []
    if view.left_padding and not hooked(view.model):
        groups = group_by_prefix(heads, math.ceil(_PAYS * budget))
    if groups and not view.continues:
        groups = []  # asked only where there are groups: finding out runs the model
    for number, (length, members) in enumerate(groups):
        opening = Opening.run(view, heads[members[0]][:length])
        reason = ""
        if number == 0 or at_ends:
            reason = _reason_against(view, encoder, opening, [rows[index] for index in members], at_ends)
        if reason:
            warnings.warn(
                f"{type(view.model).__name__} reads what prompts have in common anew for each of them: {reason}",
                KecoreWarning,
                stacklevel=4,
            )
            break
        yield from batches(opening, members)
        for index in members:
            del ungrouped[index]
    yield from batches(NO_OPENING, list(ungrouped))


def group_by_prefix(heads: Sequence[Sequence[int]], least: int) -> list[tuple[int, list[int]]]:
    """Find groups of rows that begin alike, each with the number of tokens that its rows share.

    Rows that agree in more tokens are grouped first, by powers of two, so that what many rows share does not hide what
    fewer of them share beyond it.

    Args:
        heads: what may be shared of each row.
        least: tokens that a group has to spare, ``shared * (rows - 1)``; other rows are in no group.

    Examples:
        >>> group_by_prefix([[*range(20), 50], [7, 8], [*range(20), 60]], 20)
        [(20, [0, 2])]
    """
    accepted: list[tuple[int, list[int]]] = []
    ungrouped = dict(enumerate(heads))
    longest = max(map(len, heads), default=0)
    for exponent in reversed(range(longest.bit_length())):
        length = 1 << exponent
        if length < _SHORT:
            break
        candidates: dict[tuple[int, ...], list[int]] = {}
        for index, head in ungrouped.items():
            if len(head) >= length:
                candidates.setdefault(tuple(head[:length]), []).append(index)
        for members in candidates.values():
            # They agree in `length` tokens at the least, perhaps in more.
            shared = len(common_prefix([ungrouped[index] for index in members]))
            if len(members) > 1 and shared * (len(members) - 1) >= least:
                accepted.append((shared, members))
                for index in members:
                    del ungrouped[index]
    return accepted


@torch.no_grad()
def _reason_against(
    view: ModelView, encoder: Encoder, opening: Opening, rows: Sequence[Sequence[int]], at_ends: bool
) -> str:
    """Return why an opening must not be used: a row ends in other logits behind it than it does whole.

    The shortest row is compared, and where padding stands behind the opening the longest too: from it follows how much
    of it.

    Returns:
        The reason in words; empty where the opening can be used.
    """
    compared = [min(rows, key=len)]
    if at_ends:
        compared.append(max(rows, key=len))
    behind_opening = _last_logits(view, _pad_tails(encoder, opening, compared, at_ends), opening)
    whole = _last_logits(view, _pad_tails(encoder, NO_OPENING, compared, at_ends), NO_OPENING)
    error = difference(behind_opening, whole)
    if error <= rounding(view, whole.dtype):
        return ""
    return f"logits behind it differ by {error:.1e}"  # NaN too


def _pad_tails(encoder: Encoder, opening: Opening, rows: Sequence[Sequence[int]], at_ends: bool) -> Rows:
    """Pad what follows the opening in each row to one rectangle."""
    tails = [row[len(opening.ids) :] for row in rows]
    last_columns = [len(tail) - 1 for tail in tails] if at_ends else None
    return encoder.rows(tails, last_columns)


def _last_logits(view: ModelView, rows: Rows, opening: Opening) -> Tensor:
    """Return the logits behind the last token of each row, ``[rows, vocab]``."""
    return opening.logits_at(view, rows, torch.arange(len(rows.offset)), rows.ends - 1)
