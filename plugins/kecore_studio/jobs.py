"""Work on the model, one piece after another in one thread, which pages watch and can end.

A model is a single thing that edits change in place, so nothing else may run while an edit is put on it. The queue
keeps that promise, and the event loop that serves the page stays free.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

from kecore.api.errors import KecoreError
from kecore.api.pages import web_address

__all__ = ["Cancelled", "Job", "Jobs", "describe_error"]

JobState = Literal["waiting", "running", "done", "failed", "cancelled"]

_KEPT = 40
"""Finished jobs whose results a page that was loaded anew can still fetch."""

_PACE = 0.1
"""Seconds between two reports of the progress of one stage."""


class Cancelled(BaseException):
    """Somebody ended the job; raised where the work reports its progress, so that methods clean up behind them.

    It is no ``Exception``, as ``KeyboardInterrupt`` is none: code that goes on after errors does not go on after it.
    """


@dataclass
class Job:
    """One piece of work.

    Args:
        id: its number, as a text.
        kind: what is done, in a word.
        title: what is done, for people.
        key: a job takes the place of an earlier one with the same key; empty for those that stand by themselves.
        state: how far it is.
        stage: what goes on now.
        done: steps of the stage that are done.
        total: its steps; 0 where that is not known.
        begun: seconds since the epoch; None while it waits.
        seconds: how long it ran; None until it has ended.
        partial: what is known of the result already.
        result: JSON values, once it is done.
        error: what went wrong, for people; see :func:`describe_error`.
    """

    id: str
    kind: str
    title: str
    key: str = ""
    state: JobState = "waiting"
    stage: str = ""
    done: int = 0
    total: int = 0
    begun: float | None = None
    seconds: float | None = None
    partial: dict[str, Any] = field(default_factory=dict[str, Any])
    result: Any = None
    error: dict[str, str] | None = None
    _publish: Callable[[str, Any], None] = field(default=lambda _kind, _values: None, repr=False)
    _cancelled: threading.Event = field(default_factory=threading.Event, repr=False)
    _reported: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ("done", "failed", "cancelled")

    def cancel(self) -> None:
        """Ask the work to end at its next report of progress."""
        self._cancelled.set()

    def check(self) -> None:
        """Go on only where nobody has ended the job.

        Raises:
            Cancelled: somebody has.
        """
        if self._cancelled.is_set():
            raise Cancelled

    def report(self, stage: str, done: int, total: int) -> None:
        """Say how far the work is; a :data:`~kecore.api.progress.Progress`.

        Raises:
            Cancelled: somebody has ended the job.
        """
        self.check()
        now = time.monotonic()
        is_new = stage != self.stage or (total > 0 and done >= total)
        self.stage, self.done, self.total = stage, done, total
        if is_new or now - self._reported >= _PACE:
            self._reported = now
            self._publish("job", self.to_json())

    def tell(self, **values: Any) -> None:
        """Make a part of the result known.

        Raises:
            Cancelled: somebody has ended the job.
        """
        self.check()
        self.partial.update(values)
        self._publish("partial", {"id": self.id, "values": values})

    def to_json(self, *, whole: bool = False) -> dict[str, Any]:
        """Return the job as JSON values.

        Args:
            whole: with the result and what is known of it.
        """
        values = {
            "id": self.id,
            "kind": self.kind,
            "title": self.title,
            "state": self.state,
            "stage": self.stage,
            "done": self.done,
            "total": self.total,
            "begun": self.begun,
            "seconds": self.seconds,
            "error": self.error,
        }
        if whole:
            values |= {"partial": dict(self.partial), "result": self.result}
        return values


Work = Callable[[Job], Any]
"""What a job does; returns JSON values."""


class Jobs:
    """A queue of jobs and the thread that works on them.

    Args:
        publish: called with the kind and the values of an event, from any thread.
    """

    def __init__(self, publish: Callable[[str, Any], None]) -> None:
        self._publish = publish
        self._queue: queue.Queue[tuple[Job, Work] | None] = queue.Queue()
        self._jobs: dict[str, Job] = {}
        self._numbers = count(1)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="kecore-studio", daemon=True)
        self._thread.start()

    def submit(self, kind: str, title: str, work: Work, *, key: str = "", ends: Collection[str] = ()) -> Job:
        """Put a job at the end of the queue.

        Args:
            kind: what is done, in a word.
            title: what is done, for people.
            work: called in the thread.
            key: ends earlier jobs with the same key that have not ended.
            ends: ends earlier jobs of these kinds, whose answers the new one makes worthless.
        """
        with self._lock:
            job = Job(str(next(self._numbers)), kind, title, key, _publish=self._publish)
            self._jobs[job.id] = job
            self._forget()
            earlier = [item for item in self._jobs.values() if not item.ended and item is not job]
        for other in earlier:
            if (key and other.key == key) or other.kind in ends:
                self.cancel(other.id)
        self._publish("job", job.to_json())
        self._queue.put((job, work))
        return job

    def get(self, id: str) -> Job | None:
        """Return a job; None where there is none of that number, or none any more."""
        return self._jobs.get(id)

    def cancel(self, id: str) -> Job | None:
        """Ask a job to end; one that waits ends at once. None where there is none of that number."""
        job = self._jobs.get(id)
        if job is None:
            return None
        job.cancel()
        with self._lock:
            waits = job.state == "waiting"
            if waits:
                job.state = "cancelled"
        if waits:
            self._publish("job", job.to_json())
        return job

    def to_json(self) -> list[dict[str, Any]]:
        """Return the jobs that have not ended, as JSON values."""
        with self._lock:
            jobs = list(self._jobs.values())
        return [job.to_json(whole=True) for job in jobs if not job.ended]

    def close(self, patience: float = 5.0) -> None:
        """End all jobs and the thread.

        Args:
            patience: seconds to wait for the work to end.
        """
        with self._lock:
            jobs = list(self._jobs.values())
        for job in jobs:
            self.cancel(job.id)
        self._queue.put(None)
        self._thread.join(patience)

    def _forget(self) -> None:
        """Drop the oldest finished jobs."""
        finished = [job.id for job in self._jobs.values() if job.ended]
        for id in finished[:-_KEPT]:
            del self._jobs[id]

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                return
            job, work = item
            with self._lock:
                if job.state != "waiting":
                    continue
                job.state, job.begun = "running", time.time()
            self._publish("job", job.to_json())
            self._work(job, work)
            self._publish("job", job.to_json(whole=True))

    def _work(self, job: Job, work: Work) -> None:
        """Do the job's work and note how it ended."""
        begin = time.perf_counter()
        state: JobState = "failed"
        try:
            job.result = work(job)
            state = "done"
        except Cancelled:
            state = "cancelled"
        except Exception as error:  # noqa: BLE001 - the page shows it, and the thread goes on with the next job
            job.error = describe_error(error)
            if not isinstance(error, KecoreError):
                logging.getLogger("kecore.studio").error("%s", traceback.format_exc())
        job.seconds = time.perf_counter() - begin
        job.state = state


def describe_error(error: BaseException) -> dict[str, str]:
    """Return an error as a page shows it: its class, what was expected, what came and what to do, and where to read on.

    The message of a :class:`KecoreError` says what was expected, what came, and after its last semicolon what to do.
    """
    name = type(error).__name__
    if isinstance(error, KecoreError):
        what, _, advice = str(error).rpartition("; ")
        values: Mapping[str, str] = {"what": what or advice, "advice": advice if what else ""}
        return {"type": name, "message": str(error), **values, "page": web_address(name)}
    if name == "OutOfMemoryError":  # torch's
        first = str(error).partition("\n")[0]
        return {
            "type": name,
            "message": first,
            "what": first,
            "advice": "start the studio with a lower --memory, --dtype bfloat16, or --device cpu",
            "page": "",
        }
    message = f"{name}: {error}"
    advice = "this is a mistake in kecore or in a plugin; the terminal of the studio shows where"
    return {"type": name, "message": message, "what": message, "advice": advice, "page": ""}
