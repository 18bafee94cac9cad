"""Many texts written at once: batches that new texts join and finished ones leave between two steps of the model.

Each batch is a :class:`~kecore.inference.decoding.Decoding`, rows over one key-value cache. Prompts that arrive
together are read together, as a batch of their own, and after their first token they join the batch that runs already
where the model's cache allows it (:attr:`kecore.model.ModelView.joins_rows`, which was tried out). Where it does not
(windows, recurrent states, edits with hooks), batches take turns, one step each, so that nobody waits for others to
finish in any case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kecore.inference.batching import micro_batches
from kecore.inference.decoding import Decoding
from kecore.memory import cached_share
from kecore_serve.server.sampling import choose_tokens
from kecore_serve.server.writing import Piece, Writing

if TYPE_CHECKING:
    from kecore.model import ModelView
    from kecore.text import Encoder

__all__ = ["Batches", "Row"]


@dataclass(eq=False, slots=True)
class Row:
    """A text in a batch, and who is told of it.

    Args:
        writing: the text.
        deliver: called with each piece, by the thread that runs the model.
        fail: called once instead of a last piece, if the model cannot be run.
        is_wanted: whether anybody still waits for it.
    """

    writing: Writing
    deliver: Callable[[Piece], None]
    fail: Callable[[Exception], None]
    is_wanted: Callable[[], bool] = lambda: True

    @property
    def columns(self) -> int:
        """Most tokens that it takes in a cache."""
        return len(self.writing.prompt_ids) + self.writing.sampling.max_tokens

    @property
    def is_running(self) -> bool:
        """Whether it goes on."""
        return not self.writing.finished and self.is_wanted()


@dataclass(eq=False, slots=True)
class _Batch:
    decoding: Decoding
    rows: list[Row]


class Batches:
    """The texts that are being written now.

    Args:
        view: the model; the caller freezes it and switches gradients off around all calls.
        encoder: pads.
        prompt_tokens: padded tokens of prompts that are read in one pass.
        cache_tokens: padded tokens, written ones included, that the caches may hold; a single text may exceed it.
    """

    def __init__(self, view: ModelView, encoder: Encoder, prompt_tokens: int, cache_tokens: int) -> None:
        self.view, self.encoder = view, encoder
        self._prompt_tokens, self._cache_tokens = prompt_tokens, cache_tokens
        self._batches: list[_Batch] = []

    @property
    def rows(self) -> list[Row]:
        """All texts under way."""
        return [row for batch in self._batches for row in batch.rows if row.is_running]

    @property
    def reserved(self) -> int:
        """Tokens that the texts under way may come to take in caches."""
        return sum(row.columns for row in self.rows)

    def has_room(self, row: Row, promised: int) -> bool:
        """Return whether a further text fits; a first one always does.

        Args:
            row: the text.
            promised: tokens that texts may take which are about to be started.
        """
        reserved = self.reserved + promised
        return reserved == 0 or reserved + row.columns <= self._cache_tokens

    def start(self, rows: Sequence[Row]) -> None:
        """Read prompts and write the first token behind each."""
        lengths = [len(row.writing.prompt_ids) for row in rows]
        share = cached_share(self.view) if self.view.continues else 1.0
        costs = [math.ceil(share * row.writing.sampling.max_tokens) for row in rows]
        for indices in micro_batches(lengths, costs, self._prompt_tokens):
            members = [rows[index] for index in indices]
            prompts = [row.writing.prompt_ids for row in members]
            last_columns = [len(prompt) - 1 for prompt in prompts]  # rows end in one column
            batch = _Batch(Decoding(self.view, self.encoder.rows(prompts, last_columns)), members)
            self._batches.append(batch)
            self._step(batch)
        self._join()

    def step(self) -> None:
        """Write one token of each text."""
        for batch in list(self._batches):
            self._step(batch)
        self._join()

    def _step(self, batch: _Batch) -> None:
        """Write one token of each text of a batch; a batch that fails ends alone."""
        try:
            choices = choose_tokens(batch.decoding.logits(), [row.writing.sampler for row in batch.rows])
            for row, choice in zip(batch.rows, choices, strict=True):
                if row.is_running:
                    row.deliver(row.writing.push(choice))
            is_running = [row.is_running for row in batch.rows]
            if not any(is_running):
                self._batches.remove(batch)
                return
            batch.decoding.append(torch.tensor([choice.token for choice in choices]), is_running)
            kept = [index for index, runs in enumerate(is_running) if runs]
            if len(kept) < len(batch.rows) and batch.decoding.keep(kept):
                batch.rows = [batch.rows[index] for index in kept]
        except Exception as error:  # noqa: BLE001 - one batch that cannot go on must not end the others
            self._end(batch, error)

    def _end(self, batch: _Batch, error: Exception) -> None:
        self._batches.remove(batch)
        for row in batch.rows:
            if row.is_running:
                row.fail(error)

    def _join(self) -> None:
        """Make one batch of several where the model allows it and their padding does not cost too much."""
        if len(self._batches) < 2:
            return
        joined: list[_Batch] = []
        for batch in list(self._batches):
            if not any(self._joins(target, batch) for target in joined):
                joined.append(batch)

    def _joins(self, target: _Batch, batch: _Batch) -> bool:
        """Put the texts of one batch into another one, and return whether they are there now."""
        columns = max(target.decoding.width, batch.decoding.width)
        if (len(target.rows) + len(batch.rows)) * columns > self._cache_tokens:
            return False
        try:
            if not target.decoding.join(batch.decoding):
                return False
        except Exception as error:  # noqa: BLE001 - both caches may be half joined now: out of memory, for instance
            self._end(target, error)
            target.rows = []
            self._end(batch, error)
            return True
        self._batches.remove(batch)
        target.rows += batch.rows
        return True
