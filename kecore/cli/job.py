"""Makes one edit from facts to file, and shows how: what ``kecore edit`` and ``kecore demo`` do alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kecore.api.errors import EditStateError
from kecore.cli.console import Screen, count_noun, format_estimate
from kecore.cli.loading import provide_statistics
from kecore.cli.machine import measure_cost, show_plans
from kecore.cli.outcome import Outcome
from kecore.cli.samples import Ask, Sample, continue_prompts
from kecore.cli.scores import flatten_scores
from kecore.hub import EDIT
from kecore.statistics_source import StatisticsSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kecore.api.config import MethodConfig
    from kecore.api.line import MethodLine
    from kecore.api.types import EditRecord
    from kecore.edit import Edit
    from kecore.editor import Editor
    from kecore.evaluate import Evaluation, Protocol
    from kecore.facts import FactsReport
    from kecore.memory import MemoryPlan, Need
    from kecore.retry import Retry
    from kecore.trained import TrainedEditor

__all__ = ["EditJob"]


@dataclass(frozen=True)
class EditJob:
    """Everything that decides what an edit will be.

    Args:
        method: the method, with its stages.
        records: the facts.
        source: where key statistics come from, should the method need them.
        preset: a published set-up to start from.
        values: fields of the method's configuration.
        evaluate: ask the model before and after, and score the records; False runs the edit alone.
        trained: what the method's training left, should it need one.
        examples: where demonstrations are taken from, should the method need some.
        retry: edit again, on top, what the edit failed to write.
    """

    method: MethodLine
    records: Sequence[EditRecord]
    source: StatisticsSource = field(default_factory=StatisticsSource)
    preset: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    evaluate: bool = True
    trained: TrainedEditor | None = None
    examples: Sequence[EditRecord] = ()
    retry: bool = False

    @property
    def config(self) -> MethodConfig:
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
        from kecore.facts import as_requests
        from kecore.retry import check_retry

        config = self.config
        if self.retry:
            check_retry(self.method)
        self.source.check()
        requests = as_requests(self.records)
        check_request(self.method, config, requests, trained=self.trained is not None, examples=bool(self.examples))

    def suggest_presets(self, screen: Screen, editor: Editor) -> None:
        """Name the published set-ups for a model of this shape, where nothing was chosen; none is ever applied."""
        if self.preset is not None or self.values:
            return
        presets = editor.presets(self.method)
        if presets:
            names = ", ".join(f"--preset {name}" for name in presets)
            screen.log(f"published for a model of this shape: {names} (`kecore methods {self.method.method.name}`)")

    def run(self, screen: Screen, editor: Editor, out: Path | None, asks: Sequence[Ask]) -> Outcome:
        """Edit the model and write the edit.

        Args:
            screen: shows the progress.
            editor: a session; the edit stays attached.
            out: folder for the edit; None where only the session's ledger keeps it.
            asks: prompts to be continued before and after, where the job evaluates.
        """
        from kecore.evaluate import compare

        layers = editor.statistics_layers(self.method, preset=self.preset, **self.values)
        plans = self.preflight(screen, editor, layers)
        provide_statistics(screen, editor, self.method, layers, self.source)
        prompts = [ask.prompt for ask in asks]
        protocol = self._protocol(editor)
        before = after = retry = None
        texts_before: list[str] = []
        texts_after: list[str] = []
        if self.evaluate:
            with screen.stage("before", "asking the model before the edit"):
                before = editor.evaluate(self.records, protocol)
                report = editor.check(self.records)
                texts_before = continue_prompts(editor.view, editor.encoder, prompts)
            _warn_of_known(screen, report)
        with screen.stage("edit", f"editing {count_noun(len(self.records), 'fact')} with {self.method.name}"):
            edit = editor.edit(self.records, self.method, preset=self.preset, **self.values)
        path = _save(screen, editor, edit, out)
        if before is not None:
            with screen.stage("after", "asking the model after the edit"):
                after = editor.evaluate(self.records, protocol)
                texts_after = continue_prompts(editor.view, editor.encoder, prompts)
            if self.retry:
                retry = self._edit_failed_again(screen, editor, out, after)
                after = retry.evaluation
                if retry.kept:
                    texts_after = continue_prompts(editor.view, editor.encoder, prompts)
            after = compare(before, after)
            if editor.journal is not None:
                editor.journal.score(edit.id, flatten_scores(after) or {})
        samples: list[Sample] = []
        for ask, text_before, text_after in zip(asks, texts_before, texts_after, strict=False):
            samples.append(Sample(ask, text_before, text_after))
        return Outcome(
            job=self,
            editor=editor,
            path=path,
            protocol=protocol,
            before=before,
            after=after,
            samples=samples,
            cost=measure_cost(screen, editor.view.device, editor.history[-1].stages),
            plans=plans,
            retry=retry,
        )

    def _edit_failed_again(self, screen: Screen, editor: Editor, out: Path | None, first: Evaluation) -> Retry:
        """Edit again what failed, and write both edits as one where that is better."""
        from kecore.retry import retry_failed

        with screen.stage("retry", "editing again what failed"):
            retry = retry_failed(
                editor, self.records, self.method,
                first=first, protocol=first.protocol, preset=self.preset, **self.values,
            )  # fmt: skip
        if retry.kept and out is not None:
            editor.save(out / EDIT)
        return retry

    def _protocol(self, editor: Editor) -> Protocol:
        from kecore.evaluate import Protocol

        form = "chat" if editor.encoder.chat else "plain"
        return Protocol(form=form, edits="single" if len(self.records) == 1 else "batch", seed=editor.seed)

    def preflight(self, screen: Screen, editor: Editor, layers: Sequence[int]) -> list[MemoryPlan]:
        """Say what each stage will take in memory, before any begins.

        Raises:
            MemoryBudgetError: the session's budget cannot hold it; names what is needed.
        """
        from kecore.inference.scoring import BATCH_TOKENS
        from kecore.memory import scoring_need

        groups = [editor.statistics_needs(layers), [scoring_need(editor.view, BATCH_TOKENS)]]
        plans = [editor.memory_plan(needs) for needs in groups if needs]
        plans.append(editor.preflight(self.records, self.method, preset=self.preset, **self.values))
        show_plans(screen, plans, asked=editor.memory is not None)
        self._show_forecast(screen, editor, plans[-1].needs)
        return plans

    def _show_forecast(self, screen: Screen, editor: Editor, needs: Sequence[Need]) -> None:
        """Say about how long the edit takes, and the questions before and after it."""
        from kecore.evaluate.runner import evaluation_work
        from kecore.forecast import forecast_seconds, measure_pace

        pace = measure_pace(editor.view)
        seconds = forecast_seconds(pace, needs) if needs else None
        spans = [f"{self.method.name} does not tell" if seconds is None else f"{format_estimate(seconds)} for the edit"]
        if self.evaluate:
            work = evaluation_work(editor.view, editor.encoder, self.records, self._protocol(editor))
            spans.append(f"{format_estimate(2 * pace.seconds(work))} for the scores before and after")
        screen.log(f"time: about {', '.join(spans)}")


def _save(screen: Screen, editor: Editor, edit: Edit, out: Path | None) -> Path:
    """Write the edit to its folder, and return its file; a ledger has it already."""
    if out is None:
        if editor.journal is None:
            raise EditStateError("an edit goes to a folder or to a ledger, and there is neither")
        return editor.journal.path_of(edit.id)
    with screen.stage("save", f"writing {out / EDIT}"):
        return edit.save(out / EDIT)


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
