"""Running a plan: every record of every run is edited and scored once, however often the work is cut off.

What is written is the unit of the store: a record where facts are edited one at a time, a block of records where one
edit serves many. A run that goes on asks the store what is missing. The edit of a batch is kept on disk until its last
record is scored, and so is a sequence of edits as far as it has come, with what its method remembers
(:mod:`kecore_bench.sequence`). Steps since the last time that it was kept are made again, and not scored again.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from kecore.api.errors import (
    ArtifactError,
    KecoreError,
    KecoreWarning,
    StorageError,
    StoreInUseError,
    UnsupportedCapabilityError,
)
from kecore.api.line import MethodLine
from kecore.api.progress import silent
from kecore.api.types import EditRecord
from kecore.edit import Edit, attached, load_edit
from kecore.edit.effect import EffectEdit
from kecore.evaluate.answers import RecordResult
from kecore.evaluate.cost import added_latency, edit_bytes
from kecore.evaluate.metrics import metrics_of
from kecore.evaluate.protocol import AFTER, AT_EDIT, AT_END
from kecore.evaluate.result import compare
from kecore.memory import peak_bytes, reset_peak
from kecore_bench.cells import Cell
from kecore_bench.sequence import Progress, SavedSequence
from kecore_bench.store import BEFORE, Store
from kecore_bench.workplace import Workplace

if TYPE_CHECKING:
    from torch import Tensor

    from kecore.editor import Editor

__all__ = ["BLOCK", "forget_failures", "run_cells"]

BLOCK = 16
"""Records that are scored and written together where one edit serves many. Fixed: blocks are the same every time."""

TIMED, TIMED_TOKENS = 4, 8
"""Records whose prompts are timed once a run, and tokens that are written after each."""


def run_cells(
    cells: Sequence[Cell],
    store: Store,
    workplace: Workplace,
    *,
    shard: tuple[int, int] = (0, 1),
) -> None:
    """Do what is missing of the cells.

    A record or a run that ends in one of kecore's errors is written down with its reason, and the others go on; after
    :func:`forget_failures` it is tried again.

    Args:
        cells: the runs.
        store: where results go.
        workplace: opens models, and tells what goes on.
        shard: which share of the work this process does, and of how many.
    """
    rank, processes = shard
    unfinished: list[Cell] = []
    for index, cell in enumerate(cells):
        # What one edit serves is one process's; what is edited record by record, or not at all, is shared.
        if (_is_shared(cell, store) or index % processes == rank) and cell.missing(store):
            unfinished.append(cell)
    for model, group in groupby(unfinished, key=lambda cell: cell.spec.model):
        editor = workplace.open(model)
        for cell in group:
            worker = _Worker(cell, store, editor, workplace, shard)
            worker.work()
            workplace.note(cell.spec.key)
            workplace.log(worker.summary())


def forget_failures(cells: Sequence[Cell], store: Store) -> None:
    """Forget what failed, so that :func:`run_cells` tries it again; once, before any process begins."""
    for cell in cells:
        if not cell.absent:
            store.forget_failures(cell.spec.key)


def _is_shared(cell: Cell, store: Store) -> bool:
    if cell.absent or cell.edit is not None:
        return False
    return cell.spec.method is None or store.protocol.edits == "single"


@dataclass
class _Worker:
    """One process's share of one run.

    Args:
        cell: the run.
        store: where results go.
        editor: a session on the run's model.
        workplace: gives methods what they need, and tells what goes on.
        shard: which share of the work this process does, and of how many.
    """

    cell: Cell
    store: Store
    editor: Editor
    workplace: Workplace
    shard: tuple[int, int]

    def __post_init__(self) -> None:
        self.spec, self.key = self.cell.spec, self.cell.spec.key
        self.protocol = self.store.protocol
        self.progress = self.workplace.progress
        self.share = self.shard if _is_shared(self.cell, self.store) else (0, 1)
        self.is_timed = False  # the latency of this run's edits was measured

    def work(self) -> None:
        """Do what is missing."""
        made_on = {**self.workplace.describe(self.editor), "left_out": self.cell.left_out}
        self.store.add_run(self.spec, made_on)
        self.workplace.note("")
        self.editor.progress = silent
        if self.spec.method is None:
            with self.workplace.stage(self.spec.label, f"running {self.spec.label}"):
                self._guard("all", self._score_as_it_is)
            return
        self._guard("all", self._prepare_and_run)

    def summary(self) -> str:
        """Return what became of the run, in a line."""
        done = {moment: len(self.store.done(self.key, moment)) for moment in self.cell.wanted(self.protocol)}
        text = ", ".join(f"{count} records {moment}" for moment, count in done.items())
        line = f"{self.spec.label}, {self.spec.data['name']}: {text or 'nothing'}"
        failures = self.store.failures(self.key)
        if failures:
            line += f"; {len(failures)} failed: {failures[0].kind}: {failures[0].message}"
        return line

    def _prepare_and_run(self) -> None:
        method = MethodLine.of(str(self.spec.method))  # a baseline may not be installed
        has_steps = self.protocol.edits == "sequential" and len(self.cell.records) > self.protocol.step
        if has_steps and not method.capabilities.sequential:  # early: the first step's scores would stand alone
            raise UnsupportedCapabilityError(
                f"method '{method.name}' does not edit an edited model, so it cannot take part in a sequence; compare "
                f"it by {'edits=batch or ' if method.capabilities.batch else ''}edits=single"
            )
        self.workplace.prepare(self.editor, method.name, self.spec.config)
        self.is_timed = any("latency" in cost for cost in self.store.costs(self.key).values())
        gc.collect()  # what earlier runs left would stand in the memory of this one's edits
        if self.protocol.edits != "single":  # stages of one fact would only flicker
            self.editor.progress = self.progress
        run_by_kind = {"single": self._run_single, "batch": self._run_batch, "sequential": self._run_sequence}
        run = run_by_kind[self.protocol.edits]
        with self.workplace.stage(self.spec.label, f"running {self.spec.label}"):
            run()

    def _guard(self, part: str, do: Callable[[], None]) -> bool:
        """Run a part; an error of kecore's is written down, whatever edits were on the model come off."""
        try:
            do()
        except (StorageError, StoreInUseError):
            raise  # of no use to go on
        except KecoreError as error:
            self.store.fail(self.key, part, error)
            return False
        finally:
            if self.editor.history:
                self.editor.revert(len(self.editor.history))
            self.editor.stepwise_undo = True
        return True

    def _score_as_it_is(self) -> None:
        """Score the unedited model, or an edit that was made before."""
        if self.cell.edit is None:
            self._score(BEFORE)
            return
        with _attach_file(self.editor, self.cell.edit) as edit:
            if not self.store.costs(self.key):
                cost = {
                    "seconds": None,
                    "records": len(edit.requests),
                    "stages": {},
                    "peak_memory_bytes": None,
                    **_describe_edit(edit),
                    **self._measure_latency(),
                    "warnings": [],
                }
                self.store.add_cost(self.key, "all", cost)
            self._score(AFTER)

    def _run_single(self) -> None:
        done = self.store.done(self.key, AFTER)
        index, processes = self.share
        share = range(index, len(self.cell.records), processes)
        pending = [position for position in share if position not in done]
        for count, position in enumerate(pending):
            self.progress("records", count, len(pending))
            self._guard(self.cell.records[position].request.id, partial(self._edit_alone, position))

    def _edit_alone(self, position: int) -> None:
        """Edit one record, score it, and write both."""
        record = self.cell.records[position]
        cost = self._make_edit([record]) | self._measure_latency()
        rows = self._score_records([record])
        self.store.add(self.key, AFTER, {position: rows[0]}, (record.request.id, cost))

    def _run_batch(self) -> None:
        file = self.store.edit_file(self.key)
        if file is not None and file.is_file() and self.store.costs(self.key):
            with _attach_file(self.editor, file):
                self._score(AFTER)
        else:
            cost = self._make_edit(self.cell.records) | self._measure_latency()
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                self.editor.history[-1].edit.save(file)
            self.store.add_cost(self.key, "all", cost)
            self._score(AFTER)
        if file is not None:
            file.unlink(missing_ok=True)

    def _run_sequence(self) -> None:
        records, step = self.cell.records, self.protocol.step
        wanted = self.cell.positions(self.protocol)
        checkpoints = self.protocol.checkpoints(len(records))
        folder = self.store.edit_folder(self.key)
        saved = None if folder is None else SavedSequence(folder)
        watch = self.workplace.watch(self.editor)  # of the model before its edits
        self.editor.stepwise_undo = False  # all edits come off together, at the end
        steps_done = self._resume(saved)
        steps = math.ceil(len(records) / step)
        for number in range(steps_done + 1, steps + 1):
            start, stop = (number - 1) * step, min(number * step, len(records))
            cost = self._make_edit(records[start:stop])
            cost["state_bytes"] = _tensor_bytes(self.editor.remembered(str(self.spec.method)))
            if number == steps:  # a memory of many edits may take longer to look up than one of few
                cost |= self._measure_latency()
            if watch is not None and (number in checkpoints or number in (1, steps)):
                cost["held_out"] = watch(self.editor).to_json()
            self.store.add_cost(self.key, f"step-{number}", cost)
            if AT_EDIT in wanted:
                self._score(AT_EDIT, [position for position in wanted[AT_EDIT] if start <= position < stop])
            if number in checkpoints:
                moment = checkpoints[number]
                self._score(moment, wanted[moment], self._answers_at_edit(start, stop))
            self.workplace.note("")
            if not self.cell.missing(self.store):
                break
            if saved is not None:
                edits = [entry.edit for entry in self.editor.history]
                saved.keep(number, edits, self.editor.remembered(str(self.spec.method)), last=number == steps)
        if AT_END in wanted:
            self._score(AT_END, wanted[AT_END], self._answers_at_edit((steps - 1) * step, len(records)))
        if saved is not None:
            saved.remove()

    def _answers_at_edit(self, start: int, stop: int) -> dict[int, RecordResult]:
        """Return the answers of a step's facts right after it: while no further edit is made, they are still those."""
        rows = self.store.rows(self.key, AT_EDIT, range(start, stop))
        return rows if AT_EDIT in self.protocol.when else {}

    def _resume(self, saved: SavedSequence | None) -> int:
        """Put the edits of steps that were done before on the model, and return the number of these steps."""
        progress = self._load_progress(saved)
        if progress is None:
            return 0
        self.editor.resume(progress.edits, {str(self.spec.method): progress.state})
        self.workplace.log(f"{self.spec.label}: going on after step {progress.steps}, whose edits were kept")
        return progress.steps

    def _load_progress(self, saved: SavedSequence | None) -> Progress | None:
        """Return how far the sequence was; None where it cannot go on from there."""
        try:
            progress = None if saved is None else saved.load()
        except ArtifactError as error:
            self.workplace.log(f"{self.spec.label}: the edits of earlier steps are made again, since {error}")
            return None
        if progress is None:
            return None
        step, size = self.protocol.step, len(self.cell.records)
        expected: dict[str, int] = {}  # records that the store has to hold, by moment
        if AT_EDIT in self.protocol.when:
            facts = min(progress.steps * step, size)
            expected[AT_EDIT] = sum(position < facts for position in self.protocol.drawn(size))
        for number, moment in self.protocol.checkpoints(size).items():
            if number <= progress.steps:
                expected[moment] = len(self.protocol.drawn(number * step))
        # A store that was deleted and begun anew has none of what its predecessor's edits were asked.
        if any(len(self.store.done(self.key, moment)) < count for moment, count in expected.items()):
            return None
        return progress

    def _make_edit(self, records: Sequence[EditRecord]) -> dict[str, Any]:
        """Make an edit, and return what it cost."""
        device = self.editor.view.device
        was_reset = reset_peak(device)
        begin = perf_counter()
        with _collect_warnings() as messages:
            edit = self.editor.edit(records, str(self.spec.method), **dict(self.spec.config))
        return {
            "seconds": perf_counter() - begin,
            "records": len(records),
            "stages": dict(self.editor.history[-1].stages),
            "peak_memory_bytes": peak_bytes(device),
            "peak_is_the_edits": was_reset,
            **_describe_edit(edit),
            "warnings": messages,
        }

    def _measure_latency(self) -> dict[str, Any]:
        """Return what the edits on the model add to a token; measured once a run."""
        if self.is_timed:
            return {}
        self.is_timed = True
        prompts = [record.request.text for record in self.cell.records[:TIMED]]
        latency = added_latency(self.editor.view, self.editor.encoder, prompts, tokens=TIMED_TOKENS, rounds=1)
        return {"latency": latency.to_json()}

    def _score(
        self, moment: str, positions: Sequence[int] | None = None, known: Mapping[int, RecordResult] | None = None
    ) -> None:
        """Score what is missing of some records, block by block.

        Args:
            moment: the moment.
            positions: the records; None for those of the run that are wanted at this moment.
            known: answers by position that the model as it is has given already, and is not asked for again.
        """
        records = self.cell.records
        if positions is None:
            positions = self.cell.positions(self.protocol)[moment]
        done = self.store.done(self.key, moment)
        again = {position: row for position, row in (known or {}).items() if position in {*positions} - done}
        if again:
            self.store.add(self.key, moment, again)
            done = done | again.keys()
        index, processes = self.share
        for number, first in enumerate(range(0, len(positions), BLOCK)):
            pending = [position for position in positions[first : first + BLOCK] if position not in done]
            if not pending or number % processes != index:
                continue
            self.progress(f"scoring {moment}", first, len(positions))
            rows = self._score_records([records[position] for position in pending])
            self.store.add(self.key, moment, dict(zip(pending, rows, strict=True)))

    def _score_records(self, records: Sequence[EditRecord]) -> tuple[RecordResult, ...]:
        """Ask the edited model, and the unedited one too where a metric compares distributions of both."""
        after = self.editor.evaluate(records, self.protocol)
        if not any(metric.distribution for metric in metrics_of(self.protocol)):
            return after.rows
        # Next-token distributions are too large to be stored: they are compared while both models are at hand.
        model = self.editor.model
        edits = attached(model)
        for edit in reversed(edits):
            edit.revert(model)
        before = self.editor.evaluate(records, self.protocol)
        for edit in edits:
            edit.attach(model)
        return compare(before, after).rows


@contextmanager
def _attach_file(editor: Editor, file: Path) -> Iterator[Edit]:
    """Keep an edit from a file on the model while a block runs."""
    edit = load_edit(file)
    edit.attach(editor.model)
    try:
        yield edit
    finally:
        edit.revert(editor.model)


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of what a method remembers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _describe_edit(edit: Edit) -> dict[str, Any]:
    """Return what an edit takes to keep, and whether it holds what earlier ones of its sequence hold."""
    return {"edit_bytes": edit_bytes(edit), "supersedes": isinstance(edit, EffectEdit) and edit.supersedes}


@contextmanager
def _collect_warnings() -> Iterator[list[str]]:
    """Collect kecore's own warnings, which go into the store; others are raised again."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KecoreWarning)
        yield messages
    _split_warnings(caught, messages)


def _split_warnings(caught: Iterable[warnings.WarningMessage], messages: list[str]) -> None:
    for item in caught:
        if issubclass(item.category, KecoreWarning):
            messages.append(str(item.message))
        else:
            warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)
