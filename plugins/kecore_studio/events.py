"""Tells every open page what happens in the session: a small publisher of events, with server-sent events as its wire.

Work runs in a thread of its own, pages are served by an event loop; :meth:`Events.publish` may be called from any
thread.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

__all__ = ["Events"]

_PATIENCE = 15.0
"""Seconds of silence after which a comment is sent, so that a page and proxies between see a living connection."""

_QUEUE = 2000
"""Events that a page may be behind; one that is further behind gets a new connection, and with it the whole state."""


class Events:
    """Pages that listen, and what is sent to them."""

    def __init__(self) -> None:
        self._listeners: dict[asyncio.Queue[str | None], asyncio.AbstractEventLoop] = {}

    @property
    def listeners(self) -> int:
        """Number of pages that listen now."""
        return len(self._listeners)

    def publish(self, kind: str, values: Any) -> None:
        """Send an event to every page that listens.

        Args:
            kind: name of the event.
            values: JSON values.
        """
        message = format_event(kind, values)
        for queue, loop in list(self._listeners.items()):
            try:
                loop.call_soon_threadsafe(_put, queue, message)
            except RuntimeError:  # the loop has been closed: its server has stopped
                self._listeners.pop(queue, None)

    async def listen(self, first: str) -> AsyncIterator[str]:
        """Yield what is sent to a page, until it goes.

        Args:
            first: what it gets at once: the state as it is now.
        """
        queue: asyncio.Queue[str | None] = asyncio.Queue(_QUEUE)
        self._listeners[queue] = asyncio.get_running_loop()
        try:
            yield first
            while True:
                try:
                    message = await asyncio.wait_for(queue.get(), _PATIENCE)
                except asyncio.TimeoutError:
                    yield ": still here\n\n"
                    continue
                if message is None:
                    return
                yield message
        finally:
            self._listeners.pop(queue, None)

    def close(self) -> None:
        """Let every page's connection end."""
        for queue, loop in list(self._listeners.items()):
            try:
                loop.call_soon_threadsafe(_end, queue)
            except RuntimeError:
                self._listeners.pop(queue, None)


def format_event(kind: str, values: Any) -> str:
    """Return an event as it stands on the wire."""
    return f"event: {kind}\ndata: {json.dumps(values, ensure_ascii=False)}\n\n"


def _put(queue: asyncio.Queue[str | None], message: str) -> None:
    if queue.full():
        _end(queue)
    else:
        queue.put_nowait(message)


def _end(queue: asyncio.Queue[str | None]) -> None:
    """Forget what was not sent and end the connection; the page opens another one."""
    while not queue.empty():
        queue.get_nowait()
    queue.put_nowait(None)
