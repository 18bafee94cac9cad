"""Editor: a session over one model, the only object with state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor, nn

from kecore.api.errors import ArtifactMismatchError, EditStateError, UnsupportedModelError
from kecore.api.identity import Fingerprint
from kecore.api.line import MethodLine
from kecore.api.method import MethodContext
from kecore.api.progress import Progress, Stages, choose_progress, log_stage
from kecore.api.requirements import check_model, check_request, missing_statistics, statistics_layers
from kecore.api.types import EditRecord, EditRequest, check_conflicts
from kecore.batch import RequestBatch
from kecore.checkpoint import Written, write_checkpoint
from kecore.edit import Edit, acting, attached, set_edits, without_edits
from kecore.facts import Facts, FactsReport, as_records, as_requests, report_facts
from kecore.forecast import forecast_seconds, measure_pace
from kecore.journal import Journal, common_length, open_journal
from kecore.memory import MemoryPlan, Need, make_plan, measure_held, scoring_need
from kecore.model import ModelView
from kecore.models import reference_of
from kecore.statistics import KeyStatistics
from kecore.statistics_source import Provision, StatisticsSource, log_provision
from kecore.text import Encoder

if TYPE_CHECKING:
    from kecore.api.config import MethodConfig, Preset
    from kecore.evaluate import Evaluation, Protocol
    from kecore.trained import TrainedEditor

__all__ = ["Editor", "HistoryEntry"]

Statistics: TypeAlias = Literal["auto"] | StatisticsSource | KeyStatistics | str | Path | None
"""Key statistics, or where a session gets them; see :class:`Editor`."""


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One edit of a session.

    Args:
        edit: the edit, attached to the model.
        method: the method's name.
        stages: wall seconds by stage.
        state_before: the method's state that taking the edit off brings back; None of an edit that was resumed, that
            a journal keeps, or that was made without stepwise undo.
    """

    edit: Edit
    method: str
    stages: Mapping[str, float]
    state_before: Mapping[str, Tensor] | None = field(repr=False)


def _check_model(model: object) -> None:
    """Refuse what is no model, such as the reference of one.

    Raises:
        UnsupportedModelError: says what came.
    """
    if not isinstance(model, nn.Module):
        came = f"'{model}'" if isinstance(model, str) else type(model).__name__
        raise UnsupportedModelError(
            f"an Editor takes a model and its tokenizer, got {came}; Editor.from_pretrained(REF) loads both"
        )


class Editor:
    """Edits one model, keeps the history, and takes edits off again.

    As a context manager it restores the model on exit.

    Args:
        model: any transformers causal language model; it stays usable as it is.
        tokenizer: its fast tokenizer.
        statistics: key statistics of the unedited model, for methods that need them, or a path they are loaded from.
            ``"auto"`` takes what a method reads from kecore's cache and else collects it from a text that kecore
            ships; a :class:`~kecore.statistics_source.StatisticsSource` names another text. None refuses such methods.
        trained: trained editors of the unedited model, for methods that need them; at most one a method.
        examples: records that methods may take demonstrations from, for methods that need them.
        chat: put prompts into the tokenizer's chat template.
        seed: seeds everything random.
        memory: most bytes that the process may hold at one time on the model's device, program and weights
            included; see :mod:`kecore.memory`. None takes three quarters of what is free.
        progress: called while long stages advance, such as a :class:`~kecore.api.progress.ProgressBar`. ``"auto"``
            shows such a bar in a terminal or a notebook and nothing elsewhere; None shows nothing. What stage begins
            also goes to the log ``kecore.stages``.

    Attributes:
        stepwise_undo: edits keep what their method remembered, so that any number of them can be taken off and further
            ones made. False spares that memory in a long sequence: such edits come off together, and are not saved
            with what a further edit would need.

    Raises:
        UnsupportedModelError: the model's structure cannot be read.
        TokenizerError: the tokenizer gives no offsets, or has no chat template when ``chat`` is asked for.
        StatisticsMismatchError: the statistics belong to other weights.
        ArtifactMismatchError: a trained editor belongs to other weights.
        EditStateError: the model carries edits already; the session would not know its base.
        MemoryBudgetError: the budget cannot hold the model.
        StatisticsMismatchError: the statistics are those of other weights.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        statistics: Statistics = "auto",
        trained: TrainedEditor | Sequence[TrainedEditor] = (),
        examples: Sequence[EditRecord] = (),
        chat: bool = False,
        seed: int = 0,
        memory: int | None = None,
        progress: Progress | Literal["auto"] | None = "auto",
    ) -> None:
        _check_model(model)
        if attached(model):
            raise EditStateError(
                f"the model carries {len(attached(model))} edit(s) already; revert them, "
                "or use the Editor that made them"
            )
        self.view = ModelView.of(model, whole=True)
        self.encoder = Encoder(tokenizer, chat=chat, max_length=self.view.max_length, handover=self.view.handover_ids)
        self.seed, self.memory = seed, memory
        self.progress = choose_progress(progress)
        self._identity = self.view.identity()
        self.base = Fingerprint.of(self._identity, self.view.dtype)
        self._source: StatisticsSource | None = None
        self._statistics: KeyStatistics | None = None
        self.statistics = statistics
        self._trained: dict[str, TrainedEditor] = {}
        self.trained = trained
        self.examples = tuple(examples)
        self.stepwise_undo = True
        self._history: list[HistoryEntry] = []
        self._journal: Journal | None = None
        self._journal_state = ""
        self._states: dict[str, Mapping[str, Tensor]] = {}
        self._memo: dict[Any, Any] = {}
        self._held = measure_held(self.view)
        make_plan(self.view, memory, (), self._held)

    @classmethod
    def from_pretrained(cls, ref: str, *, device: str = "auto", dtype: str = "auto", **options: Any) -> Editor:
        """Load a model by reference (hub id, directory, ``.gguf`` file or ``demo``) and open a session on it.

        Raises:
            ModelLoadError: the reference leads nowhere.
        """
        from kecore.models import load_model

        progress = options["progress"] = choose_progress(options.get("progress", "auto"))
        with log_stage(f"loading {ref}"):
            progress(f"loading {ref}", 0, 0)
            loaded = load_model(ref, device=device, dtype=dtype)
        progress("reading the model's structure", 0, 0)
        editor = cls(loaded.model, loaded.tokenizer, **options)
        progress("reading the model's structure", 1, 1)
        return editor

    @classmethod
    def on(cls, journal: Journal | str | Path, *, device: str = "auto", dtype: str = "auto", **options: Any) -> Editor:
        """Load the model of a ledger and open a session that goes on with it; see :meth:`follow`.

        Args:
            journal: a ledger, or its folder.
            device: as :meth:`from_pretrained` takes it.
            dtype: as :meth:`from_pretrained` takes it.
            options: those of the class.

        Raises:
            ArtifactError: the folder holds no ledger, or a damaged one.
            ArtifactMismatchError: the model is no longer the one that the ledger is of.
            ModelLoadError: the model's reference leads nowhere.
        """
        opened = open_journal(journal) if isinstance(journal, (str, Path)) else journal
        editor = cls.from_pretrained(opened.model, device=device, dtype=dtype, **options)
        editor.follow(opened)
        return editor

    def follow(self, journal: Journal) -> None:
        """Put a ledger's edits on the model, and write to the ledger what this session edits and takes off.

        Edits by other processes are put on the model before each edit of this session; :meth:`synchronise` does so at
        any time. What methods remember between edits goes on where the ledger's last edit left it.

        Raises:
            EditStateError: the session has edits already, or follows a ledger.
            ArtifactMismatchError: the ledger is of other weights.
        """
        if self._history or self._journal is not None:
            raise EditStateError("the session has edits or a ledger already; open another one to go on with a ledger")
        difference = journal.base.differs(self._identity, self.view.dtype)
        if difference:
            raise ArtifactMismatchError(
                f"the ledger is of other weights than this model: fingerprint {difference}; open it on "
                f"'{journal.model}' as it was when the ledger was begun"
            )
        self._journal = journal
        try:
            self.synchronise()
        except BaseException:
            self._journal = None
            raise

    def synchronise(self) -> bool:
        """Put on the model what the session's ledger has in effect by now, and nothing else.

        Returns:
            Whether the model was changed.

        Raises:
            EditStateError: the session follows no ledger.
            ArtifactError: an edit of the ledger cannot be read.
        """
        journal = self._journal
        if journal is None:
            raise EditStateError("the session follows no ledger; open it with Editor.on(ledger)")
        state, ids = journal.state, journal.active_ids()
        if state == self._journal_state:
            return False
        stays = common_length([entry.edit.id for entry in self._history], ids)
        history = self._history[:stays]
        for id_ in ids[stays:]:
            edit = journal.load_edit(id_)
            history.append(HistoryEntry(edit, edit.method, {}, None))
        set_edits(self.model, [entry.edit for entry in history], base=self._identity)
        self._history, self._states, self._journal_state = history, {}, state
        return True

    @property
    def model(self) -> nn.Module:
        """The model with the edits of this session on it."""
        return self.view.model

    @property
    def statistics(self) -> KeyStatistics | None:
        """Key statistics of the unedited model that are at hand; a source gives them when a method reads them."""
        return self._statistics

    @statistics.setter
    def statistics(self, value: Statistics) -> None:
        self._source = self._statistics = None
        if value == "auto":
            self._source = StatisticsSource()
        elif isinstance(value, StatisticsSource):
            self._source = value
        elif value is not None:
            statistics = value if isinstance(value, KeyStatistics) else KeyStatistics.load(value)
            statistics.check(self.view, self._identity)
            self._statistics = statistics

    def presets(self, method: str | type[Any] | MethodLine = "memit") -> dict[str, Preset]:
        """Return the method's published set-ups for a model of this shape, by name; told by structure, not by name."""
        from kecore.api.config import ModelShape

        shape = ModelShape.of(self.view)
        presets = MethodLine.of(method).method.Config.presets()
        return {name: preset for name, preset in presets.items() if preset.model == shape}

    def statistics_layers(
        self, method: str | type[Any] | MethodLine = "memit", *, preset: str | None = None, **config: Any
    ) -> tuple[int, ...]:
        """Return the layers whose key statistics :meth:`edit` with the same arguments reads; empty where it reads none.

        Raises:
            ConfigError: a bad field.
        """
        line = MethodLine.of(method)
        return statistics_layers(line, self._config(line, preset, config), self.view)

    def statistics_needs(self, layers: Sequence[int]) -> list[Need]:
        """Say what :meth:`provide_statistics` takes in memory where they are not in the cache; nothing if at hand."""
        if self._source is None or self._covers(layers):
            return []
        return self._source.needs(self.view, layers)

    def provide_statistics(
        self, layers: Sequence[int], announce: Callable[[Provision], None] = log_provision
    ) -> KeyStatistics:
        """Get statistics that cover these layers from the session's source, unless they are at hand.

        :meth:`edit` does so itself; a program that times it or says what goes on does it before.

        Args:
            layers: what they have to cover.
            announce: called once it is known whether a text has to be run through the model.

        Raises:
            UnsupportedCapabilityError: the session has neither statistics nor a source.
            StatisticsMismatchError: those that were given do not cover a layer, or are of other weights.
            ArtifactError: those that were saved cannot be read.
            DataFormatError: the text cannot be read.
            MemoryBudgetError: the session's budget cannot hold the collection.
        """
        if self._source is not None and not self._covers(layers):
            with without_edits(self.model):
                statistics = self._source.provide(self, layers, announce)
            statistics.check(self.view, self._identity)
            self._statistics = statistics
        if self._statistics is None:
            raise missing_statistics()
        for layer in layers:
            self._statistics.need(layer)
        return self._statistics

    def _covers(self, layers: Sequence[int]) -> bool:
        return self._statistics is not None and set(layers) <= set(self._statistics.layers)

    @property
    def trained(self) -> tuple[TrainedEditor, ...]:
        """Trained editors of the unedited model."""
        return tuple(self._trained.values())

    @trained.setter
    def trained(self, value: TrainedEditor | Sequence[TrainedEditor]) -> None:
        editors = list(value) if isinstance(value, Sequence) else [value]
        for editor in editors:
            editor.check(self.view, editor.method, self.base)
        self._trained = {editor.method: editor for editor in editors}

    @property
    def journal(self) -> Journal | None:
        """The ledger that the session follows; None where it follows none."""
        return self._journal

    @property
    def history(self) -> tuple[HistoryEntry, ...]:
        """Edits that are on the model, oldest first."""
        return tuple(self._history)

    def edit(
        self,
        requests: Facts,
        method: str | type[Any] | MethodLine = "memit",
        *,
        preset: str | None = None,
        **config: Any,
    ) -> Edit:
        """Plan an edit and attach it.

        Args:
            requests: one or many facts.
            method: name of an installed method, with stages behind it or without (``"memit + blue"``), a file with a
                method that is not (``"./mine.py:Mine"``), or its class.
            preset: a published set-up of the method, to start from.
            config: fields of the method's configuration.

        Returns:
            The edit, attached to the model.

        Raises:
            MethodNotFoundError: no such method.
            PluginError: the class breaks the contract of a method.
            ConfigError: a bad field.
            UnsupportedCapabilityError: the method cannot do what is asked, was not trained, or has no examples.
            MissingDependencyError: the method uses a package that is not installed.
            ArtifactMismatchError: the configuration is not the one that the method was trained with.
            RequestError: no request, something else than requests, or two that contradict each other.
            MemoryBudgetError: the session's budget cannot hold what the edit needs.
            StoreInUseError: another process is writing to the session's ledger.
        """
        if self._journal is None:
            return self._edit(requests, MethodLine.of(method), preset, config)
        if self._journal.base.digests != self.base.digests:
            raise ArtifactMismatchError(
                f"the ledger's base is stored in {self._journal.base.dtype}, and this session has it in "
                f"{self.base.dtype}: edits that were planned on rounded weights would not be edits of the base; open "
                "the session in the ledger's type to edit"
            )
        with self._journal.writing():  # so that no other edit comes in between planning and writing
            self.synchronise()
            return self._edit(requests, MethodLine.of(method), preset, config)

    def _edit(self, requests: Facts, line: MethodLine, preset: str | None, config: Mapping[str, Any]) -> Edit:
        method_config = self._config(line, preset, config)
        request_list = as_requests(requests)
        self._check(line, method_config, request_list)
        batch = RequestBatch.of(request_list, self.encoder)
        layers = statistics_layers(line, method_config, self.view)
        if layers:
            self.provide_statistics(layers)
        plan = self._plan(method_config, batch)
        context = MethodContext(
            config=method_config,
            encoder=self.encoder,
            seed=self.seed,
            statistics=self._statistics,
            trained=self._trained.get(line.name),
            examples=self.examples,
            earlier=acting(entry.edit for entry in self._history if entry.method == line.name),
            base=self.base,
            state=dict(self.remembered(line.name)),
            memo=self._memo,
            progress=self.progress,
            stages=Stages(),
            memory=plan.activations,
        )
        facts = "1 fact" if len(request_list) == 1 else f"{len(request_list)} facts"
        with log_stage(f"editing {facts} with {line.name}"):
            edit = replace(line.plan(self.view, batch, context), model=reference_of(self.model))
            if not self.stepwise_undo:
                edit = replace(edit, state={})
            if self.encoder.chat:
                edit = replace(edit, notes={**edit.notes, "form": "chat"})
            if self._history:
                planned_with = [entry.edit.id for entry in self._history]
                edit = replace(edit, notes={**edit.notes, "planned_with": planned_with})
            with context.stages("attach"):
                edit.attach(self.model, base=self._identity)
        before: Mapping[str, Tensor] | None = self._states.get(line.name, {})
        if not self.stepwise_undo:
            before = None
        if self._journal is not None:
            before = None  # the ledger knows
            self._record(self._journal, replace(edit, state=context.state))
        self._states[line.name] = context.state
        self._history.append(HistoryEntry(edit, line.name, dict(context.stages.seconds), before))
        return edit

    def _record(self, journal: Journal, edit: Edit) -> None:
        """Write an edit that is on the model to the ledger; on failure it is on neither."""
        try:
            journal.append(edit, planned_on=self._journal_state)
        except BaseException:
            set_edits(self.model, [entry.edit for entry in self._history], base=self._identity)
            raise
        self._journal_state = journal.state

    def check(self, facts: Facts) -> FactsReport:
        """Ask the model as it is now whether it answers the facts already, before they are edited.

        Args:
            facts: the facts.

        Returns:
            Which requests it answers already, and which were given more than once.

        Raises:
            RequestError: no request, something else than requests, or two that contradict each other.
            MemoryBudgetError: the session's budget cannot hold the scoring of a single request.
        """
        requests = as_requests(facts)
        check_conflicts(requests)
        return report_facts(self.view, self.encoder, requests, batch_tokens=self.batch_tokens, progress=self.progress)

    def preflight(
        self,
        requests: Facts,
        method: str | type[Any] | MethodLine = "memit",
        *,
        preset: str | None = None,
        **config: Any,
    ) -> MemoryPlan:
        """Plan what :meth:`edit` with the same arguments takes in memory, and its micro-batches; nothing is computed.

        Raises:
            MemoryBudgetError: the session's budget cannot hold it; names what is needed.
        """
        line = MethodLine.of(method)
        batch = RequestBatch.of(as_requests(requests), self.encoder)
        return self._plan(self._config(line, preset, config), batch)

    def forecast(
        self,
        requests: Facts,
        method: str | type[Any] | MethodLine = "memit",
        *,
        preset: str | None = None,
        **config: Any,
    ) -> float | None:
        """Return how many seconds :meth:`edit` with the same arguments takes on this machine, at the most and about.

        Measured on the model's lowest layers for a moment. Key statistics that have to be collected first come on top;
        :meth:`provide_statistics` announces how long they take. None where the method does not say what it computes.

        Raises:
            ConfigError: a bad field.
            RequestError: no request, something else than requests, or two that contradict each other.
        """
        line = MethodLine.of(method)
        batch = RequestBatch.of(as_requests(requests), self.encoder)
        needs = self._config(line, preset, config).needs(self.view, batch)
        return forecast_seconds(measure_pace(self.view), needs) if needs else None

    def memory_plan(self, needs: Sequence[Need]) -> MemoryPlan:
        """Plan how stages with these needs keep within the session's budget.

        Raises:
            MemoryBudgetError: they cannot; names what is needed.
        """
        return make_plan(self.view, self.memory, needs, self._held)

    @property
    def batch_tokens(self) -> int:
        """Padded tokens of a micro-batch of scoring that keeps within the session's budget.

        Raises:
            MemoryBudgetError: not even the smallest one does.
        """
        from kecore.inference.scoring import BATCH_TOKENS

        need = scoring_need(self.view, BATCH_TOKENS)
        return need.micro_batch(self.memory_plan([need]).activations)

    def revert(self, count: int = 1) -> None:
        """Take the last ``count`` edits off; with none left the model is bitwise what it was.

        Raises:
            EditStateError: there are fewer edits than that, or some of those that were resumed would stay.
        """
        if not 0 < count <= len(self._history):
            raise EditStateError(f"cannot revert {count} edit(s); the session has {len(self._history)}")
        if self._journal is not None:
            self.withdraw([entry.edit.id for entry in self._history[-count:]])
            return
        resumed = sum(entry.state_before is None for entry in self._history)
        if 0 < len(self._history) - count < resumed:
            raise EditStateError(
                f"{resumed} edits were resumed, or made without stepwise_undo, and what the method remembered between "
                f"them is not known; revert all {len(self._history)} edits, or only those that came after"
            )
        for _ in range(count):
            entry = self._history[-1]
            entry.edit.revert(self.model)
            self._states[entry.method] = entry.state_before or {}
            self._history.pop()

    def withdraw(self, ids: str | Sequence[str]) -> None:
        """Take edits of the session's ledger back, any of them, on the ledger and on the model.

        Args:
            ids: beginnings of their ids.

        Raises:
            EditStateError: the session follows no ledger, or an edit is not in effect.
            ArtifactError: no such edit, or more than one that begins so.
        """
        if self._journal is None:
            raise EditStateError("the session follows no ledger; take edits off with Editor.revert(count)")
        with self._journal.writing():
            self._journal.revert(ids)
            self.synchronise()

    def remembered(self, method: str) -> Mapping[str, Tensor]:
        """Return what a method will find in its state at its next edit.

        Raises:
            EditStateError: its ledger does not know that; see ``Ledger.method_state``.
        """
        if self._journal is not None and method not in self._states:
            self._states[method] = self._journal.method_state(method)
        return dict(self._states.get(method, {}))

    def resume(self, edits: Sequence[Edit], states: Mapping[str, Mapping[str, Tensor]] | None = None) -> None:
        """Go on where earlier sessions ended: their edits are put on, and methods remember what they did.

        Args:
            edits: those that acted, oldest first.
            states: by method, what :meth:`remembered` gave then; by default what each method's last edit carries.

        Raises:
            EditStateError: this session has edits already, or an edit is given twice.
            ArtifactMismatchError: an edit is for another model.
        """
        if self._history or self._journal is not None:
            raise EditStateError(f"the session has {len(self._history)} edit(s) already; revert them first")
        set_edits(self.model, edits, base=self._identity)
        for edit in edits:
            self._history.append(HistoryEntry(edit, edit.method, {}, None))
            if states is None:
                self._states[edit.method] = edit.state
        for method, state in (states or {}).items():
            self._states[method] = dict(state)

    def arrange(self, entries: Sequence[HistoryEntry], states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Let these edits, in this order, be the history of the session and on the model; all of them or none.

        So a program switches single edits off and on again, takes one out of the middle, or puts on one that was read
        from a file.

        Args:
            entries: the edits, oldest first; those of :attr:`history`, or others of the same base.
            states: what each method is to find at its next edit; see :meth:`remembered`.

        Raises:
            ArtifactMismatchError: an edit is for another model.
            EditStateError: an edit is given twice, something else has changed the weights, or the session follows a
                ledger.
            NonFiniteError: the edits together overflow the model's type.
        """
        if self._journal is not None:
            raise EditStateError("the session follows a ledger, which says what is on the model; use Editor.withdraw")
        set_edits(self.model, [entry.edit for entry in entries], base=self._identity)
        self._history, self._states = list(entries), dict(states)

    def ask(self, prompt: str, *, max_new_tokens: int = 32) -> str:
        """Return what the model as it is now writes behind a prompt: its most probable tokens, to the end of the line.

        Args:
            prompt: the text; in the chat template where the session uses it.
            max_new_tokens: most tokens to write.

        Raises:
            PromptTooLongError: the prompt does not fit into the model's context.

        Examples:
            >>> editor.ask("The Eiffel Tower is located in the city of")             # doctest: +SKIP
            'Paris, France.'
        """
        from kecore.inference import generate

        (written,) = generate(
            self.view, self.encoder, [prompt], max_new_tokens=max_new_tokens, stop_at_newline=True,
            batch_tokens=self.batch_tokens,
        )  # fmt: skip
        return written.text

    def __repr__(self) -> str:
        view = self.view
        edits = ", ".join(entry.method for entry in self.history) or "no edits"
        model = f"{type(view.model).__name__}, {len(view.layers)} layers"
        return f"<Editor on {model}, {str(view.dtype).removeprefix('torch.')} on {view.device}: {edits}>"

    def evaluate(self, records: Facts, protocol: Protocol | None = None) -> Evaluation:
        """Score the model as it is now; see :func:`kecore.evaluate.evaluate`.

        Args:
            records: facts with their probes; of a request alone, its own prompt is scored.
            protocol: what is scored, and how; the default one where None.
        """
        from kecore.evaluate import Protocol, evaluate

        protocol = protocol or Protocol(form="chat" if self.encoder.chat else "plain")
        options: dict[str, Any] = {"batch_tokens": self.batch_tokens, "progress": self.progress}
        with log_stage("asking the model"):
            return evaluate(self.view, self.encoder, as_records(records), protocol, **options)

    def save(self, path: str | Path) -> Path:
        """Write the edits of this session as one edit.

        Raises:
            EditStateError: nothing was edited, or the edits cannot be one file.
        """
        from kecore.edit import WeightEdit, merge

        edits = acting(entry.edit for entry in self._history)
        if not edits:
            raise EditStateError("nothing was edited yet, so there is nothing to save")
        if len(edits) == 1:
            return edits[0].save(path)
        weights = [edit for edit in edits if isinstance(edit, WeightEdit)]
        if len(weights) < len(edits):
            raise EditStateError(
                f"edits of {', '.join(dict.fromkeys(edit.method for edit in edits))} cannot be saved as one, as not "
                "all of them change weights; save each (`edit.save`)"
            )
        return merge(weights).save(path)

    def save_checkpoint(self, out: str | Path, *, ref: str = "") -> Written:
        """Write the model with the edits of this session as a checkpoint for any program of Hugging Face's format.

        It also carries what :func:`kecore.checkpoint.take_off_edits` needs to give the base back, bit for bit.

        Args:
            out: a directory that is not there yet, or empty.
            ref: the reference of the base model, for the record; by default that which it was loaded by.

        Raises:
            ArtifactError: ``out`` is something else, or an edit changes no weights.
            StorageError: the disk is full, or the place is not writable.
        """
        return write_checkpoint(self.model, self.encoder.tokenizer, out, ref=ref)

    def __enter__(self) -> Editor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._journal is not None:  # what the ledger has in effect stays in effect there
            set_edits(self.model, (), base=self._identity)
            self._journal, self._history, self._states, self._journal_state = None, [], {}, ""
        elif self._history:
            self.revert(len(self._history))

    def _config(self, line: MethodLine, preset: str | None, fields: Mapping[str, Any]) -> MethodConfig:
        return line.make_config(fields, preset=preset, trained=self._trained.get(line.name))

    def _check(self, line: MethodLine, config: MethodConfig, requests: Sequence[EditRequest]) -> None:
        """Refuse an edit for which something is missing, before anything is run."""
        check_request(line, config, requests, trained=line.name in self._trained, examples=bool(self.examples))
        statistics = self._source is not None or self._statistics is not None
        check_model(line, config, self.view, statistics=statistics, edited=bool(self._history))

    def _plan(self, config: MethodConfig, batch: RequestBatch) -> MemoryPlan:
        return self.memory_plan(config.needs(self.view, batch))
