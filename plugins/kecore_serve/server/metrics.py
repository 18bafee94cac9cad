"""Figures for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kecore_serve.server.limits import App, Message, Receive, Send
from kecore_serve.server.worker import Observer, Worker

__all__ = ["Counted", "Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics(Observer):
    """Counts what a server does; each has a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "kecore_requests", "Requests by endpoint and status.", ["endpoint", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "kecore_request_seconds", "Seconds to the end of an answer.", ["endpoint"], buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.prompt_tokens = Counter("kecore_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self.written_tokens = Counter("kecore_written_tokens", "Tokens that were written.", registry=self.registry)
        self.edits = Counter("kecore_edits", "Changes of the edits by kind.", ["done"], registry=self.registry)
        self._rows = Histogram(
            "kecore_batch_rows", "Texts that one step of the model wrote at.", buckets=_ROWS, registry=self.registry
        )
        self._waited = Histogram(
            "kecore_queue_seconds", "Seconds that a request waited.", buckets=_SECONDS, registry=self.registry
        )
        self._paused = Histogram(
            "kecore_edit_seconds", "Seconds that texts waited for a change of the edits.", buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._active = Gauge("kecore_active_edits", "Edits on the model.", registry=self.registry)
        self._waiting = Gauge("kecore_waiting_requests", "Requests that wait.", registry=self.registry)
        self._running = Gauge("kecore_running_texts", "Texts that are being written.", registry=self.registry)

    def watch(self, worker: Worker, active: Callable[[], int]) -> None:
        """Read gauges whenever somebody asks for them.

        Args:
            worker: what waits and what is written.
            active: returns the number of edits on the model.
        """
        self._active.set_function(active)
        self._waiting.set_function(lambda: worker.waiting)
        self._running.set_function(lambda: worker.running)

    def stepped(self, rows: int) -> None:
        """Count a step of the model."""
        self._rows.observe(rows)

    def waited(self, seconds: float) -> None:
        """Count a request that was taken in."""
        self._waited.observe(seconds)

    def paused(self, seconds: float) -> None:
        """Count a change of the edits."""
        self._paused.observe(seconds)

    def text(self) -> bytes:
        """Return all figures in Prometheus' format."""
        return generate_latest(self.registry)


class Counted:
    """Counts requests and their seconds, whatever becomes of them.

    Args:
        app: what answers them.
        metrics: where they are counted.
    """

    def __init__(self, app: App, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one connection, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.perf_counter()
        status = 499  # as servers write down a client that did not wait for an answer

        async def count(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, count)
        finally:
            # The pattern and not the path, of which there are as many as clients make up.
            endpoint = getattr(scope.get("route"), "path", "unknown")
            self._metrics.requests.labels(endpoint, str(status)).inc()
            self._metrics.seconds.labels(endpoint).observe(time.perf_counter() - begin)
