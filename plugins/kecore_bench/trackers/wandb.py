"""Tracking by Weights & Biases; ``WANDB_MODE=offline`` keeps runs on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kecore_bench.trackers.base import TrackedRun, Tracker, import_tracker

__all__ = ["Wandb"]


class Wandb(Tracker):
    """A run of Weights & Biases for each run of the bench, in one group."""

    def __init__(self, project: str) -> None:
        super().__init__(project)
        self._wandb = import_tracker("wandb", "wandb")
        self._runs: dict[str, Any] = {}

    def start(self, run: TrackedRun) -> None:
        """Open a run beside those that are open; one of the same key goes on."""
        self._runs[run.key] = self._wandb.init(
            project=self.project,
            name=run.name,
            id=run.key,
            group=run.bench,
            job_type="run" if run.parent else "bench",
            config=dict(run.config),
            resume="allow",
            reinit="create_new",
        )

    def log(self, run: TrackedRun, metrics: Mapping[str, float], step: int) -> None:
        """Keep some numbers."""
        self._runs[run.key].log(dict(metrics), step=step)

    def attach(self, run: TrackedRun, file: Path) -> None:
        """Keep a file as an artifact."""
        artifact = self._wandb.Artifact(file.stem, type="kecore-store")
        artifact.add_file(str(file))
        self._runs[run.key].log_artifact(artifact)

    def finish(self, run: TrackedRun, failure: str) -> None:
        """Close the run, as failed where there is a reason."""
        opened = self._runs.pop(run.key)
        if failure:
            opened.summary["failure"] = failure
        opened.finish(exit_code=1 if failure else 0)
