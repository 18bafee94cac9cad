"""Reports what an edit did: as a result file, as JSON, and on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kecore.cli.console import Screen, count_noun
from kecore.cli.machine import show_cost
from kecore.cli.samples import Sample, samples_table
from kecore.cli.scores import flatten_scores, score_values, scores_table
from kecore.cli.verdicts import failures_table
from kecore.environment import environment

if TYPE_CHECKING:
    from kecore.cli.job import EditJob
    from kecore.editor import Editor
    from kecore.evaluate import Evaluation, Protocol
    from kecore.evaluate.verdicts import Verdict
    from kecore.memory import MemoryPlan
    from kecore.retry import Retry

__all__ = ["Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What an edit did, for people and for programs.

    Args:
        job: what the edit was to be.
        editor: the session, with the edit on the model.
        path: the edit's file.
        protocol: how it was scored.
        before: scores of the unedited model.
        after: scores of the edited model.
        samples: what both write.
        cost: time by stage, those of the method among them, and memory.
        plans: what the stages were expected to take in memory.
        retry: what came of editing failed facts again; None where that was not asked for.
    """

    job: EditJob
    editor: Editor
    path: Path
    protocol: Protocol
    before: Evaluation | None
    after: Evaluation | None
    samples: Sequence[Sample]
    cost: dict[str, Any]
    plans: Sequence[MemoryPlan]
    retry: Retry | None = None

    def to_json(self, screen: Screen, model: str) -> dict[str, Any]:
        """Return the result as JSON values, without the rows of single records."""
        editor = self.editor
        return {
            "method": self.job.method.name,
            "n": len(self.job.records),
            "model": model,
            "scores_before": flatten_scores(self.before),
            "scores": flatten_scores(self.after),
            "edit_seconds": screen.stages["edit"],
            **self.cost,
            "memory_plan": self._memory_to_json(),
            "edit_path": str(self.path),
            "edit_bytes": self.path.stat().st_size,
            "protocol": {**self.protocol.to_json(), "hash": self.protocol.hash()},
            "seed": editor.seed,
            "dtype": editor.base.dtype,
            "device": str(editor.view.device),
            "form": self.protocol.form,
            "preset": self.job.preset,
            "config": self.job.config.to_json(),
            "base": dict(editor.base.digests),
            "statistics": self._statistics_to_json(),
            "samples": [sample.to_json() for sample in self.samples],
            "retry": None if self.retry is None else self.retry.to_json(),
            "failed": [verdict.id for verdict in self.verdicts if not verdict.holds],
            "details": {"before": score_values(self.before), "after": score_values(self.after)},
            "warnings": screen.warnings,
            **environment(editor.view.device),
        }

    def _memory_to_json(self) -> dict[str, Any]:
        """Return the plan of the edit itself, with the stages of all plans."""
        values = [plan.to_json() for plan in self.plans]
        return {**values[-1], "stages": list(chain.from_iterable(plan["stages"] for plan in values))}

    def _statistics_to_json(self) -> dict[str, Any] | None:
        """Return what the statistics are that the edit read; None where it read none."""
        statistics = self.editor.statistics
        if statistics is None or not self.job.method.capabilities.needs_statistics:
            return None
        return {**statistics.header(), "base": None}

    def rows(self) -> list[dict[str, Any]]:
        """Return what became of each record, for the result file."""
        if self.before is None or self.after is None:
            return [{"id": record.request.id} for record in self.job.records]
        rows: list[dict[str, Any]] = []
        for row, before, after in zip(self.after.rows, self.before.values, self.after.values, strict=True):
            rows.append({**row.to_json(), "before": before, "after": after})
        return rows

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """Whether each fact holds after the edit; empty where nothing was evaluated."""
        from kecore.evaluate.verdicts import verdicts_of

        return [] if self.after is None else verdicts_of(self.after)

    def show(self, screen: Screen) -> None:
        """Print the result for people."""
        if self.samples:
            screen.show(samples_table(self.samples, "What the model writes"))
        if self.before is not None and self.after is not None:
            title = f"Scores of {count_noun(len(self.job.records), 'edit')}, protocol {self.protocol.hash()}"
            screen.show(scores_table(self.before, self.after, title))
            failures = failures_table(self.verdicts)
            if self.retry is not None:
                screen.show(_describe_retry(self.retry))
            screen.show(_all_hold(len(self.verdicts)) if failures is None else failures)
        show_cost(screen, self.cost)


def _all_hold(facts: int) -> str:
    return "The fact holds." if facts == 1 else f"All {facts} facts hold."


def _describe_retry(retry: Retry) -> str:
    """Say what came of a retry."""
    values = retry.to_json()
    if not retry.tried:
        return "Retry: no fact had failed."
    failed, still = len(values["failed_before"]), len(values["failed_after"])
    settings = ", ".join(f"{name}={value}" for name, value in retry.settings.items())
    how = f" again with {settings}" if settings else " again"
    end = "" if retry.kept else "; that is no better, so the retry was taken off"
    return f"Retry: {count_noun(failed, 'fact')} edited{how}; {count_noun(still, 'fact')} failed after it{end}."
