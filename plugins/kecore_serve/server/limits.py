"""Limits around all endpoints, before anything of a request is read: host names, rates, sizes of bodies."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from starlette.responses import JSONResponse

from kecore_serve.server.errors import ApiError
from kecore_serve.server.settings import Settings

__all__ = ["Limits", "Rates"]

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

UPLOAD = "/v1/edits/file"
"""The endpoint that reads its body itself, behind its token, and counts its bytes."""

_MOST_CLIENTS = 10_000


class Rates:
    """Requests of each client within a minute: a bucket of tokens that fills steadily.

    Args:
        per_minute: requests a minute; 0 for no limit.
        clock: seconds, for tests.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client: (what is left, when)

    def wait(self, client: str) -> float:
        """Count a request; return the seconds after which it would be allowed, 0 where it is."""
        if not self._per_minute:
            return 0.0
        now = self._clock()
        left, then = self._buckets.pop(client, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - then) * self._per_minute / 60)
        allowed = left >= 1
        self._buckets[client] = (left - 1 if allowed else left, now)
        if len(self._buckets) > _MOST_CLIENTS:
            self._buckets.popitem(last=False)  # who has not asked for the longest time
        return 0.0 if allowed else (1 - left) * 60 / self._per_minute


class Limits:
    """Refuses requests that are over a limit, and reads the body of all others.

    Args:
        app: what answers them.
        settings: the limits.
    """

    def __init__(self, app: App, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._rates = Rates(settings.rate)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one connection, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        error = self._refusal(scope, headers)
        if error is None and scope["path"] != UPLOAD:
            body = await self._read(receive)
            if body is None:
                error = self._too_large()
            else:
                receive = _replay(body, receive)
        if error is not None:
            response = JSONResponse(error.body(), status_code=error.status, headers=dict(error.headers))
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: MutableMapping[str, Any], headers: MutableMapping[bytes, bytes]) -> ApiError | None:
        """Return why a request is refused by its head alone; None where it is not."""
        host = headers.get(b"host", b"").decode("latin-1")
        if self._settings.hosts and _name_of(host) not in self._settings.hosts:
            return ApiError(
                421, f"this server answers to {', '.join(self._settings.hosts)}, not to '{host[:100]}'", "unknown_host"
            )
        client = scope.get("client") or ("unknown", 0)
        wait = self._rates.wait(client[0])
        if wait:
            message = f"more than {self._settings.rate} requests a minute; try again in {wait:.0f} s"
            retry = {"Retry-After": str(int(wait) + 1)}
            return ApiError(429, message, "rate_limit_exceeded", kind="rate_limit_error", headers=retry)
        length = headers.get(b"content-length", b"0")
        limit = self._settings.upload_bytes if scope["path"] == UPLOAD else self._settings.body_bytes
        if length.isdigit() and (len(length) > 18 or int(length) > limit):
            return self._too_large(limit)
        return None

    async def _read(self, receive: Receive) -> bytes | None:
        """Return the whole body; None where it is too large."""
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b"".join(chunks)
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._settings.body_bytes:
                return None
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    def _too_large(self, limit: int | None = None) -> ApiError:
        limit = limit or self._settings.body_bytes
        return ApiError(413, f"the body is larger than {limit:,} bytes; send less at a time", "body_too_large")


def _name_of(host: str) -> str:
    """Return the name in a ``Host`` header, without the port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.rpartition(":")[0] if ":" in host else host


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives the body first, and after that what the connection brings."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
