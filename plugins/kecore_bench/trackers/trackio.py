"""Tracking by trackio, which keeps runs on this machine, or in a Space of the hub (``TRACKIO_SPACE_ID``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kecore_bench.trackers.base import TrackedRun, Tracker, import_tracker

__all__ = ["Trackio"]


class Trackio(Tracker):
    """A trackio run for each run of the bench, in one group.

    trackio has one run open at a time, and closes it where another is opened; so a run is opened again where it was
    closed for another's sake.
    """

    def __init__(self, project: str) -> None:
        super().__init__(project)
        self._trackio = import_tracker("trackio", "trackio")
        self._key = ""  # of the run that is open
        self._run: Any = None

    def start(self, run: TrackedRun) -> None:
        """Open a run; one of the same bench and name goes on."""
        # A name is what trackio tells runs by, so it holds a part of the key.
        self._run = self._trackio.init(
            project=self.project,
            name=f"{run.name} ({run.key[:6]})",
            group=run.bench,
            config=dict(run.config),
            resume="allow",
            embed=False,
        )
        self._key = run.key

    def log(self, run: TrackedRun, metrics: Mapping[str, float], step: int) -> None:
        """Keep some numbers."""
        self._open(run)
        self._run.log(dict(metrics), step=step)

    def attach(self, run: TrackedRun, file: Path) -> None:
        """Keep a file as an artifact."""
        self._open(run)
        self._run.log_artifact(str(file), name=file.stem, type="kecore-store")

    def finish(self, run: TrackedRun, failure: str) -> None:
        """Close the run; trackio has no failed ones, so the reason is logged as text."""
        if failure:
            self._open(run)
            self._run.log({"failure": failure})
        if self._key == run.key:
            self._run.finish()
            self._key = ""

    def _open(self, run: TrackedRun) -> None:
        if self._key != run.key:
            self.start(run)
