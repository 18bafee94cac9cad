"""One edit from facts to file: what ``kecore edit`` and ``kecore demo`` do alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kecore.cli.console import Screen, count_noun
from kecore.cli.loading import provide_statistics
from kecore.cli.machine import measure_cost, plan_table, show_cost
from kecore.cli.samples import Ask, Sample, continue_prompts, samples_table
from kecore.cli.scores import flatten_scores, score_values, scores_table
from kecore.environment import environment
from kecore.statistics_source import StatisticsSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kecore.api.line import MethodLine
    from kecore.api.types import EditRecord
    from kecore.editor import Editor
    from kecore.evaluate import Evaluation, Protocol
    from kecore.facts import FactsReport
    from kecore.memory import MemoryPlan
    from kecore.trained import TrainedEditor

__all__ = ["EDIT", "EditJob", "Outcome"]

EDIT = "edit.safetensors"


@dataclass(frozen=True)
class EditJob:
    """Everything that decides what an edit will be.

    Args:
        method: the method, with its stages.
        records: the facts.
        source: where key statistics come from, should the method need them.
        preset: a published set-up to start from.
        values: fields of the method's configuration.
        evaluate: score the records before and after.
        trained: what the method's training left, should it need one.
        examples: where demonstrations are taken from, should the method need some.
    """

    method: MethodLine
    records: Sequence[EditRecord]
    source: StatisticsSource = field(default_factory=StatisticsSource)
    preset: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    evaluate: bool = True
    trained: TrainedEditor | None = None
    examples: Sequence[EditRecord] = ()

    @property
    def config(self) -> Any:
        """The validated configuration."""
        return self.method.make_config(self.values, preset=self.preset, trained=self.trained)

    def check(self) -> None:
        """Refuse a bad configuration, files and packages that are not there, and facts that contradict each other.

        Raises:
            ConfigError: a bad field or an unknown preset.
            ArtifactError: there are no such statistics.
            ArtifactMismatchError: the trained editor is one of another method or configuration.
            DataFormatError: there is no such text.
            MissingDependencyError: the method uses a package that is not installed.
            ModelLoadError: its sentence encoder cannot be loaded.
            RequestConflictError: names both facts.
            UnsupportedCapabilityError: the method needs training or examples and there are none, or takes one request
                at a time.
        """
        from kecore.api.requirements import check_request

        config = self.config
        self.source.check()
        requests = [request for record in self.records for request in record.requests]
        check_request(self.method, config, requests, trained=self.trained is not None, examples=bool(self.examples))

    def run(self, screen: Screen, editor: Editor, out: Path, asked: Sequence[Ask]) -> Outcome:
        """Edit the model and write the edit.

        Args:
            screen: shows the progress.
            editor: a session on the unedited model; the edit stays attached.
            out: folder for the edit.
            asked: prompts to be continued before and after.
        """
        layers = editor.statistics_layers(self.method, preset=self.preset, **self.values)
        plans = self.preflight(screen, editor, layers)
        provide_statistics(screen, editor, self.method, layers, self.source)
        prompts = [ask.prompt for ask in asked]
        protocol = _protocol(editor, len(self.records))
        with screen.stage("before", "asking the model before the edit"):
            before = editor.evaluate(self.records, protocol) if self.evaluate else None
            report = editor.check(self.records)
            old = continue_prompts(editor.view, editor.encoder, prompts)
        _warn_of_known(screen, report)
        with screen.stage("edit", f"editing {count_noun(len(self.records), 'fact')} with {self.method.name}"):
            edit = editor.edit(self.records, self.method, preset=self.preset, **self.values)
        with screen.stage("save", f"writing {out / EDIT}"):
            path = edit.save(out / EDIT)
        with screen.stage("after", "asking the model after the edit"):
            after = editor.evaluate(self.records, protocol) if self.evaluate else None
            new = continue_prompts(editor.view, editor.encoder, prompts)
        if before is not None and after is not None:
            from kecore.evaluate import compare

            after = compare(before, after)
        samples = [Sample(*item) for item in zip(asked, old, new, strict=True)]
        spent = measure_cost(screen, editor.view.device, _stages(screen, editor))
        return Outcome(self, editor, path, protocol, before, after, samples, spent, plans)

    def preflight(self, screen: Screen, editor: Editor, layers: Sequence[int]) -> list[MemoryPlan]:
        """Say what each stage will take in memory, before any begins.

        Raises:
            MemoryBudgetError: the session's budget cannot hold it; names what is needed.
        """
        from kecore.inference.scoring import BATCH_TOKENS
        from kecore.memory import scoring_need

        groups = [
            editor.statistics_needs(layers),
            [scoring_need(editor.view, BATCH_TOKENS)],
        ]
        plans = [editor.memory_plan(needs) for needs in groups if needs]
        plans.append(editor.preflight(self.records, self.method, preset=self.preset, **self.values))
        screen.err.print(plan_table(plans))
        return plans


@dataclass(frozen=True)
class Outcome:
    """What an edit did.

    Args:
        job: what was asked for.
        editor: the session, with the edit on the model.
        path: the edit's file.
        protocol: how it was scored.
        before: scores of the unedited model.
        after: scores of the edited model.
        samples: what both write.
        cost: time by stage, those of the method among them, and memory.
        plans: what the stages were expected to take in memory.
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

    def to_json(self, screen: Screen, model: str) -> dict[str, Any]:
        """The result as JSON values, without the rows of single records."""
        editor, statistics = self.editor, self.editor.statistics
        used = self.job.method.capabilities.needs_statistics and statistics is not None
        return {
            "method": self.job.method.name,
            "n": len(self.job.records),
            "model": model,
            "scores_before": flatten_scores(self.before),
            "scores": flatten_scores(self.after),
            "edit_seconds": screen.stages["edit"],
            **self.cost,
            "memory_plan": {
                **self.plans[-1].to_json(),
                "stages": [stage for plan in self.plans for stage in plan.to_json()["stages"]],
            },
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
            "statistics": {**statistics.header(), "base": None} if used and statistics else None,
            "samples": [sample.to_json() for sample in self.samples],
            "details": {"before": score_values(self.before), "after": score_values(self.after)},
            "warnings": screen.warnings,
            **environment(editor.view.device),
        }

    def rows(self) -> list[dict[str, Any]]:
        """What became of each record, for the result file."""
        if self.before is None or self.after is None:
            return [{"id": record.request.id} for record in self.job.records]
        pairs = zip(self.after.rows, self.before.values, self.after.values, strict=True)
        return [
            {
                "id": row.id,
                "source": row.source,
                "before": old,
                "after": new,
                "probes": [p.to_json() for p in row.probes],
            }
            for row, old, new in pairs
        ]

    def show(self, screen: Screen) -> None:
        """Print the result for people."""
        if self.samples:
            screen.show(samples_table(self.samples, "What the model writes"))
        if self.before is not None and self.after is not None:
            title = f"Scores of {count_noun(len(self.job.records), 'edit')}, protocol {self.protocol.hash()}"
            screen.show(scores_table(self.before, self.after, title))
        show_cost(screen, self.cost)


def _warn_of_known(screen: Screen, report: FactsReport) -> None:
    """Say which requests ask for what the model answers anyway."""
    if not report.known:
        return
    shown = ", ".join(request.id for request in report.known[:5])
    if len(report.known) > 5:
        shown += " ..."
    screen.warn(
        f"{len(report.known)} of {len(report.requests)} requests ask for what the model answers already ({shown})"
    )


def _protocol(editor: Editor, count: int) -> Protocol:
    from kecore.evaluate import Protocol

    return Protocol(
        form="chat" if editor.encoder.chat else "plain", edits="single" if count == 1 else "batch", seed=editor.seed
    )


def _stages(screen: Screen, editor: Editor) -> dict[str, float]:
    """The command's stages, with those of the method in the place of the edit as a whole."""
    stages: dict[str, float] = {}
    for name, value in screen.stages.items():
        stages |= dict(editor.history[-1].stages) if name == "edit" else {name: value}
    return stages
