"""Tracking by MLflow, at the address of ``MLFLOW_TRACKING_URI`` or where MLflow keeps runs by itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kecore_bench.trackers.base import TrackedRun, Tracker, import_tracker

__all__ = ["Mlflow"]

_BATCH = 100
"""Parameters that a server takes at once."""
_LONGEST = 500
"""Characters of a parameter that every MLflow server takes."""


class Mlflow(Tracker):
    """A run of MLflow for each run of the bench, nested in one of the bench; the project is an experiment."""

    def __init__(self, project: str) -> None:
        super().__init__(project)
        self._mlflow = import_tracker("mlflow", "mlflow")
        self._client: Any = None
        self._experiment = ""
        self._ids: dict[str, str] = {}  # of MLflow's runs, by our keys

    def start(self, run: TrackedRun) -> None:
        """Open a run."""
        if self._client is None:
            self._client = self._mlflow.tracking.MlflowClient()
            experiment = self._client.get_experiment_by_name(self.project)
            if experiment is None:
                self._experiment = self._client.create_experiment(self.project)
            else:
                self._experiment = experiment.experiment_id
        tags = {"kecore.key": run.key, "kecore.bench": run.bench}
        if run.parent in self._ids:
            tags["mlflow.parentRunId"] = self._ids[run.parent]
        made = self._client.create_run(self._experiment, tags=tags, run_name=run.name)
        self._ids[run.key] = made.info.run_id
        entities = self._mlflow.entities
        params = [entities.Param(name, str(value)[:_LONGEST]) for name, value in run.config.items()]
        for first in range(0, len(params), _BATCH):
            self._client.log_batch(made.info.run_id, params=params[first : first + _BATCH])

    def log(self, run: TrackedRun, metrics: Mapping[str, float], step: int) -> None:
        """Keep some numbers."""
        for name, value in metrics.items():
            self._client.log_metric(self._ids[run.key], name, value, step=step)

    def attach(self, run: TrackedRun, file: Path) -> None:
        """Keep a file as an artifact."""
        self._client.log_artifact(self._ids[run.key], str(file))

    def finish(self, run: TrackedRun, failure: str) -> None:
        """Close the run, as failed where there is a reason."""
        if failure:
            self._client.set_tag(self._ids[run.key], "kecore.failure", failure[:_LONGEST])
        self._client.set_terminated(self._ids[run.key], "FAILED" if failure else "FINISHED")
