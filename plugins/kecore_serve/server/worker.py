"""The one thread that runs the model: texts together, and edits between them.

What waits is taken in order. Texts join those that are being written; an operation on the edits waits until no text is
under way, and what came after it waits for the operation. So every text is written with one state of the model from
its first token to its last, and nothing that waits is ever dropped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import torch

from kecore.api.errors import PromptTooLongError
from kecore.edit import Reader, written
from kecore.inference.generation import closing_ids
from kecore.model import ModelView
from kecore.text import Encoder
from kecore_serve.server.batch import Batches, Row
from kecore_serve.server.errors import QueueFullError, StoppingError
from kecore_serve.server.sampling import Sampling
from kecore_serve.server.writing import Piece, Writing, join_pieces

__all__ = ["Event", "Failed", "Generation", "Observer", "Prompt", "Started", "Worker", "Wrote"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a text is written behind.

    Args:
        text: the prompt that prompt edits may write something before; of a chat, the last message of the user.
        encode: makes tokens of it once the prompt edits had their say. Raises a RequestError for what does not fit.
    """

    text: str
    encode: Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Started:
    """A request was taken in.

    Args:
        state: the state of the model that all its texts are written with.
        prompt_tokens: tokens of each prompt.
    """

    state: str
    prompt_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Wrote:
    """A text of a request went on, or ended.

    Args:
        number: which text.
        piece: what was added.
        written: tokens of this text so far.
    """

    number: int
    piece: Piece
    written: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A request cannot be answered."""

    error: Exception


Event: TypeAlias = Started | Wrote | Failed


@dataclass(eq=False, slots=True)
class Generation:
    """A request for one or more texts.

    Args:
        prompts: the prompts.
        copies: texts for each of them; text ``number`` belongs to prompt ``number // copies``.
        sampling: how they are written.
        post: called with each event, by the worker's thread; it must not raise.
        is_streamed: tell each piece of a text, and not only the whole text at its end.
        is_cut: texts may be written to the end of the model's context only, where ``max_tokens`` go beyond it.
        is_cancelled: nobody waits for it any more.
    """

    prompts: Sequence[Prompt]
    copies: int
    sampling: Sampling
    post: Callable[[Event], None]
    is_streamed: bool = False
    is_cut: bool = False
    is_cancelled: bool = False
    waiting: deque[Row] = field(default_factory=deque[Row])
    is_started: bool = False

    def fail(self, error: Exception) -> None:
        """End the whole request with an error."""
        if not self.is_cancelled:
            self.is_cancelled = True
            self.post(Failed(error))


@dataclass(eq=False, slots=True)
class _Operation:
    run: Callable[[], Any]
    result: Future[Any]


class Edited(Protocol):
    """What the worker has to know of the model that it runs."""

    @property
    def view(self) -> ModelView:
        """The model."""
        ...

    @property
    def encoder(self) -> Encoder:
        """Its tokenizer."""
        ...

    @property
    def state(self) -> str:
        """The state of its edits."""
        ...


class Observer:
    """Is told what the worker does; all methods do nothing here."""

    def stepped(self, rows: int) -> None:
        """A token was written in so many texts at once."""

    def waited(self, seconds: float) -> None:
        """A request was taken in after so many seconds in the queue."""

    def paused(self, seconds: float) -> None:
        """No text could be written for so long, because edits were changed."""


class Worker:
    """Runs a model in a thread of its own.

    Args:
        model: the model with its edits.
        rows: most texts that are written at once.
        prompt_tokens: padded tokens of prompts that are read in one pass.
        cache_tokens: tokens that the caches may hold.
        queue: most requests that may wait.
        observer: is told what happens.
    """

    def __init__(
        self,
        model: Edited,
        *,
        rows: int = 64,
        prompt_tokens: int = 2048,
        cache_tokens: int = 65536,
        queue: int = 256,
        observer: Observer | None = None,
    ) -> None:
        self.model = model
        self._rows, self._limit = rows, queue
        self._observer = observer or Observer()
        self._batches = Batches(model.view, model.encoder, prompt_tokens, cache_tokens)
        self._closing = closing_ids(model.view, model.encoder)
        self._queue: deque[tuple[float, Generation | _Operation]] = deque()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="kecore-serve-model", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Finish what waits and what is under way, take nothing more, and end the thread.

        Returns:
            Whether it ended within so many seconds.
        """
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def is_ready(self) -> bool:
        """Whether new requests are taken."""
        return self.is_alive and not self._is_stopping

    @property
    def waiting(self) -> int:
        """Requests and operations that wait."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Texts that are being written."""
        return len(self._batches.rows)

    def generate(self, generation: Generation) -> None:
        """Let texts be written, in their turn.

        Raises:
            QueueFullError: too many requests wait.
            StoppingError: the server stops.
        """
        self._put(generation)

    def operate(self, run: Callable[[], Any]) -> Future[Any]:
        """Let a function change the edits, in its turn and while no text is under way.

        Raises:
            QueueFullError: too many requests wait.
            StoppingError: the server stops.
        """
        operation = _Operation(run, Future())
        self._put(operation)
        return operation.result

    def _put(self, job: Generation | _Operation) -> None:
        with self._changed:
            if self._is_stopping:
                raise StoppingError("the server is stopping and takes no new requests")
            if len(self._queue) >= self._limit:
                raise QueueFullError(f"{self._limit} requests wait already; try again a little later")
            self._queue.append((time.perf_counter(), job))
            self._changed.notify_all()

    def _run(self) -> None:
        while self._wait_for_work():
            self._operate()
            with self.model.view.frozen(), torch.no_grad():
                self._write()

    def _wait_for_work(self) -> bool:
        """Wait until something is to be done; False once nothing more will come."""
        with self._changed:
            while not self._queue and not self._is_stopping:
                self._changed.wait()
            return bool(self._queue)

    def _first(self) -> Generation | _Operation | None:
        with self._changed:
            return self._queue[0][1] if self._queue else None

    def _pop(self) -> None:
        with self._changed:
            self._queue.popleft()

    def _operate(self) -> None:
        """Run the operations at the head of the queue; no text is under way."""
        while isinstance(operation := self._first(), _Operation):
            begin = time.perf_counter()
            if operation.result.set_running_or_notify_cancel():
                try:
                    operation.result.set_result(operation.run())
                except Exception as error:  # noqa: BLE001 - goes to whoever asked for it
                    operation.result.set_exception(error)
            self._pop()
            self._observer.paused(time.perf_counter() - begin)

    def _write(self) -> None:
        """Write texts until none is left, or until an operation waits and all those before it are finished."""
        while True:
            new_rows = self._take_in()
            if new_rows:
                self._batches.start(new_rows)
            running = self.running
            if not running:
                first = self._first()
                if first is None or isinstance(first, _Operation):
                    return
                continue  # what was taken in had ended at its first token, or could not be read
            self._batches.step()
            self._observer.stepped(running)

    def _take_in(self) -> list[Row]:
        """Return the texts that are begun now: as many of those that wait as there is room for, in order."""
        rows: list[Row] = []
        reserved = 0
        room = self._rows - self.running
        while room > len(rows) and isinstance(generation := self._first(), Generation):
            if not generation.is_started and not generation.is_cancelled:
                self._begin(generation)
            while generation.waiting and not generation.is_cancelled and room > len(rows):
                row = generation.waiting[0]
                if not self._batches.has_room(row, reserved):
                    return rows
                reserved += row.columns
                rows.append(generation.waiting.popleft())
            if generation.is_cancelled or not generation.waiting:
                self._pop()
        return rows

    def _begin(self, generation: Generation) -> None:
        """Read the prompts of a request with the edits as they are now, and say so."""
        generation.is_started = True
        try:
            texts = [prompt.text for prompt in generation.prompts]
            view, encoder = self.model.view, self.model.encoder
            texts = written(view.model, texts, Reader(view, encoder))
            encoded = [prompt.encode(text) for prompt, text in zip(generation.prompts, texts, strict=True)]
            samplings = [self._fit(generation, ids) for ids in encoded]
        except Exception as error:  # noqa: BLE001 - goes to whoever asked
            generation.fail(error)
            return
        number = 0
        for ids, sampling in zip(encoded, samplings, strict=True):
            for _ in range(generation.copies):
                generation.waiting.append(self._row(generation, ids, sampling, number))
                number += 1
        with self._changed:
            arrived = self._queue[0][0]
        self._observer.waited(time.perf_counter() - arrived)
        generation.post(Started(self.model.state, tuple(len(ids) for ids in encoded)))

    def _fit(self, generation: Generation, ids: Sequence[int]) -> Sampling:
        """Return how a text is written behind a prompt, within the model's context.

        Raises:
            PromptTooLongError: prompt and text do not fit.
        """
        sampling, context = generation.sampling, self.model.encoder.max_length
        if context is None:
            return sampling
        room = context + 1 - len(ids)  # the last token is written, not read
        if room < 1 or (room < sampling.max_tokens and not generation.is_cut):
            raise PromptTooLongError(
                f"the model's context holds {context} tokens, and the prompt takes {len(ids)} and max_tokens "
                f"{sampling.max_tokens}; shorten one of them"
            )
        return replace(sampling, max_tokens=min(room, sampling.max_tokens))

    def _row(self, generation: Generation, ids: Sequence[int], sampling: Sampling, number: int) -> Row:
        writing = Writing(self.model.encoder.tokenizer, ids, sampling, self._closing, number)
        pieces: list[Piece] = []

        def deliver(piece: Piece) -> None:
            pieces.append(piece)
            if generation.is_streamed or writing.finished:
                generation.post(Wrote(number, join_pieces(pieces), writing.written))
                pieces.clear()

        return Row(writing, deliver, generation.fail, lambda: not generation.is_cancelled)
