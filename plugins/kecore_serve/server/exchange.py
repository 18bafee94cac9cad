"""One request for texts, seen from the side of HTTP: what the worker posts, as an asynchronous stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress

from kecore_serve.server.sampling import Sampling
from kecore_serve.server.worker import Event, Failed, Generation, Prompt, Started, Worker, Wrote

__all__ = ["ClientGoneError", "Exchange"]

_LOOK = 1.0
"""Seconds after which a request that still waits looks whether its client does."""


class ClientGoneError(Exception):
    """The client closed the connection before it was answered."""


class Exchange:
    """A request for texts that the worker writes.

    Args:
        worker: writes them.
        prompts: the prompts.
        copies: texts for each prompt.
        sampling: how they are written.
        is_streamed: tell each piece.
        is_cut: see :class:`~kecore_serve.server.worker.Generation`.
        is_gone: whether the client closed the connection.
    """

    def __init__(
        self,
        worker: Worker,
        prompts: Sequence[Prompt],
        copies: int,
        sampling: Sampling,
        *,
        is_streamed: bool,
        is_cut: bool,
        is_gone: Callable[[], Awaitable[bool]],
    ) -> None:
        self._worker, self._is_gone = worker, is_gone
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._texts = len(prompts) * copies
        self._generation = Generation(
            prompts, copies, sampling, self._post, is_streamed=is_streamed, is_cut=is_cut
        )  # fmt: skip

    def _post(self, event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def start(self) -> Started:
        """Wait until the request is taken in.

        Raises:
            QueueFullError: too many requests wait.
            StoppingError: the server stops.
            ClientGoneError: the client closed the connection.
            RequestError: a prompt cannot be read.
        """
        self._worker.generate(self._generation)
        event = await self._next()
        if not isinstance(event, Started):
            raise RuntimeError(f"a request began with {event!r}")
        return event

    async def pieces(self) -> AsyncIterator[Wrote]:
        """Yield what is written, to the end of all texts; the request is cancelled where nobody reads to the end."""
        running = self._texts
        try:
            while running:
                event = await self._next()
                if isinstance(event, Wrote):
                    running -= event.piece.finish_reason is not None
                    yield event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Let the worker write no more of it."""
        self._generation.is_cancelled = True

    async def _next(self) -> Event:
        while True:
            try:
                event = await asyncio.wait_for(self._events.get(), _LOOK)
            except asyncio.TimeoutError:
                if await self._is_gone():
                    self.cancel()
                    raise ClientGoneError from None
                continue
            except asyncio.CancelledError:
                self.cancel()
                raise
            if isinstance(event, Failed):
                self.cancel()
                raise event.error
            return event
