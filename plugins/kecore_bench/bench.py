"""Running a plan: every record of every run is edited and scored once, however often the work is cut off.

What is written is the unit of the store: a record where facts are edited one at a time, a block of records where one
edit serves many. A run that goes on asks the store what is missing. The edit of a batch is kept on disk until its last
record is scored, and so is a sequence of edits as far as it has come, with what its method remembers
(:mod:`kecore_bench.sequence`). Steps since the last time that it was kept are made again, and not scored again.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from kecore.api import registry
from kecore.api.errors import (
    ArtifactError,
    KecoreError,
    KecoreWarning,
    StorageError,
    StoreInUseError,
    UnsupportedCapabilityError,
)
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

if TYPE_CHECKING:
    from kecore.editor import Editor

__all__ = ["BLOCK", "Workplace", "retry", "run"]

BLOCK = 16
"""Records that are scored and written together where one edit serves many. Fixed: blocks are the same every time."""

TIMED, TIMED_TOKENS = 4, 8
"""Records whose prompts are timed once a run, and tokens that are written after each."""

T = TypeVar("T")


class Workplace(Protocol):
    """What running a plan needs from outside."""

    def open(self, model: str) -> Editor:
        """A session on an unedited model."""
        ...

    def prepare(self, editor: Editor, method: str, config: Mapping[str, Any]) -> None:
        """Give the session what a method needs, such as key statistics."""
        ...

    def made_on(self, editor: Editor) -> Mapping[str, Any]:
        """``versions``, ``hardware`` and ``base`` (digests of the weights), as results record them."""
        ...

    def stage(self, label: str) -> AbstractContextManager[None]:
        """Show that a run is going on."""
        ...

    def progress(self, stage: str, done: int, total: int) -> None:
        """Show how far it is."""
        ...

    def say(self, text: str) -> None:
        """Show what became of it."""
        ...


def run(
    cells: Sequence[Cell],
    store: Store,
    workplace: Workplace,
    *,
    shard: tuple[int, int] = (0, 1),
) -> None:
    """Do what is missing of the cells.

    A record or a run that ends in one of kecore's errors is written down with its reason, and the others go on; after
    :func:`retry` it is tried again.

    Args:
        cells: the runs.
        store: where results go.
        workplace: opens models, and shows what goes on.
        shard: which share of the work this process does, and of how many.
    """
    mine = [
        cell
        for place, cell in enumerate(cells)
        # What one edit serves is one process's; what is edited record by record, or not at all, is shared.
        if (_divides(cell, store) or place % shard[1] == shard[0]) and cell.missing(store)
    ]
    for model, group in groupby(mine, key=lambda cell: cell.spec.model):
        editor = workplace.open(model)
        for cell in group:
            worker = _Worker(cell, store, editor, workplace, shard)
            worker.work()
            workplace.say(worker.summary())


def retry(cells: Sequence[Cell], store: Store) -> None:
    """Forget what failed, so that :func:`run` tries it again; once, before any process begins."""
    for cell in cells:
        if not cell.absent:
            store.forget_failures(cell.spec.key)


def _divides(cell: Cell, store: Store) -> bool:
    if cell.absent or cell.edit is not None:
        return False
    return cell.spec.method is None or store.protocol.edits == "single"


@dataclass
class _Worker:
    """One process's share of one run."""

    cell: Cell
    store: Store
    editor: Editor
    workplace: Workplace
    shard: tuple[int, int]

    def __post_init__(self) -> None:
        self.spec, self.key = self.cell.spec, self.cell.spec.key
        self.protocol = self.store.protocol
        self.progress = self.workplace.progress
        self.share = self.shard if _divides(self.cell, self.store) else (0, 1)
        self.timed = False

    def work(self) -> None:
        """Do what is missing."""
        made_on = {**self.workplace.made_on(self.editor), "left_out": self.cell.left_out}
        self.store.add_run(self.spec, made_on)
        self.editor.progress = silent
        if self.spec.method is None:
            with self.workplace.stage(self.spec.label):
                self._guarded("all", self._as_it_is)
            return
        way = {"single": self._single, "batch": self._batch, "sequential": self._sequential}[self.protocol.edits]
        self._guarded("all", lambda: self._prepared(way))

    def summary(self) -> str:
        """What became of the run, in a line."""
        done = {moment: len(self.store.done(self.key, moment)) for moment in self.cell.wanted(self.protocol)}
        text = ", ".join(f"{count} records {moment}" for moment, count in done.items())
        failed = self.store.failures(self.key)
        why = f"; {len(failed)} failed: {failed[0].kind}: {failed[0].message}" if failed else ""
        return f"{self.spec.label}, {self.spec.data['name']}: {text or 'nothing'}{why}"

    def _prepared(self, way: Callable[[], None]) -> None:
        method = registry.default_registry().get(str(self.spec.method))  # a baseline may not be installed
        several = self.protocol.edits == "sequential" and len(self.cell.records) > self.protocol.step
        if several and not method.capabilities.sequential:  # not after its first step, whose scores would stand alone
            raise UnsupportedCapabilityError(
                f"method '{method.name}' does not edit an edited model, so it cannot take part in a sequence; compare "
                f"it by {'edits=batch or ' if method.capabilities.batch else ''}edits=single"
            )
        self.workplace.prepare(self.editor, method.name, self.spec.config)
        self.timed = any("latency" in cost for cost in self.store.costs(self.key).values())
        gc.collect()  # what earlier runs left would stand in the memory of this one's edits
        if self.protocol.edits != "single":  # stages of one fact would only flicker
            self.editor.progress = self.progress
        with self.workplace.stage(self.spec.label):
            way()

    def _guarded(self, part: str, do: Callable[[], None]) -> bool:
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
        return True

    def _as_it_is(self) -> None:
        """The unedited model, or an edit that was made before."""
        if self.cell.edit is None:
            self._score(BEFORE)
            return
        with _on(self.editor, self.cell.edit) as edit:
            if not self.store.costs(self.key):
                made = {"seconds": None, "records": len(edit.requests), "stages": {}, "peak_memory_bytes": None}
                self.store.add_cost(self.key, "all", {**made, **_kept(edit), **self._latency(), "warnings": []})
            self._score(AFTER)

    def _single(self) -> None:
        done = self.store.done(self.key, AFTER)
        mine = range(self.share[0], len(self.cell.records), self.share[1])
        left = [position for position in mine if position not in done]
        for count, position in enumerate(left):
            self.progress("records", count, len(left))
            record = self.cell.records[position]
            self._guarded(record.request.id, lambda p=position, r=record: self._one(p, r))

    def _one(self, position: int, record: EditRecord) -> None:
        cost = self._edit([record]) | self._latency()
        rows = self._rows([record])
        self.store.add(self.key, AFTER, {position: rows[0]}, (record.request.id, cost))

    def _batch(self) -> None:
        file = self.store.edit_file(self.key)
        if file is not None and file.is_file() and self.store.costs(self.key):
            with _on(self.editor, file):
                self._score(AFTER)
        else:
            cost = self._edit(self.cell.records) | self._latency()
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                self.editor.history[-1].edit.save(file)
            self.store.add_cost(self.key, "all", cost)
            self._score(AFTER)
        if file is not None:
            file.unlink(missing_ok=True)

    def _sequential(self) -> None:
        records, step = self.cell.records, self.protocol.step
        wanted = self.cell.wanted(self.protocol)
        checkpoints = self.protocol.checkpoints(len(records))
        folder = self.store.edit_folder(self.key)
        saved = None if folder is None else SavedSequence(folder)
        begun = self._resumed(saved)
        steps = -(-len(records) // step)
        for number in range(begun + 1, steps + 1):
            start, stop = (number - 1) * step, min(number * step, len(records))
            cost = self._edit(records[start:stop])
            if number == steps:  # a memory of many edits may take longer to look up than one of few
                cost |= self._latency()
            self.store.add_cost(self.key, f"step-{number}", cost)
            if AT_EDIT in wanted:
                self._score(AT_EDIT, start, stop)
            if number in checkpoints:
                self._score(checkpoints[number], 0, stop)
            if all(len(self.store.done(self.key, moment)) == count for moment, count in wanted.items()):
                break
            if saved is not None:
                edits = [entry.edit for entry in self.editor.history]
                saved.keep(number, edits, self.editor.remembered(str(self.spec.method)), last=number == steps)
        if AT_END in wanted:
            self._score(AT_END)
        if saved is not None:
            saved.remove()

    def _resumed(self, saved: SavedSequence | None) -> int:
        """Put the edits of steps that were done before on the model; their number."""
        found = self._loaded(saved)
        if found is None:
            return 0
        self.editor.resume(str(self.spec.method), found.edits, found.state)
        self.workplace.say(f"{self.spec.label}: going on after step {found.steps}, whose edits were kept")
        return found.steps

    def _loaded(self, saved: SavedSequence | None) -> Progress | None:
        """How far the sequence was, if that can be gone on from."""
        try:
            found = None if saved is None else saved.load()
        except ArtifactError as error:
            self.workplace.say(f"{self.spec.label}: the edits of earlier steps are made again, since {error}")
            return None
        if found is None:
            return None
        step, size = self.protocol.step, len(self.cell.records)
        told = {name: n * step for n, name in self.protocol.checkpoints(size).items() if n <= found.steps}
        if AT_EDIT in self.protocol.when:
            told[AT_EDIT] = min(found.steps * step, size)
        # A store that was deleted and begun anew has none of what its predecessor's edits were asked.
        known = all(len(self.store.done(self.key, moment)) >= count for moment, count in told.items())
        return found if known else None

    def _edit(self, records: Sequence[EditRecord]) -> dict[str, Any]:
        """Edit, and say what it cost."""
        device = self.editor.view.device
        anew = reset_peak(device)
        begin = perf_counter()
        with _heard() as heard:
            edit = self.editor.edit(records, str(self.spec.method), **dict(self.spec.config))
        return {
            "seconds": perf_counter() - begin,
            "records": len(records),
            "stages": dict(self.editor.history[-1].stages),
            "peak_memory_bytes": peak_bytes(device),
            "peak_is_the_edits": anew,
            **_kept(edit),
            "warnings": heard,
        }

    def _latency(self) -> dict[str, Any]:
        """What the edits on the model add to a token, once a run."""
        if self.timed:
            return {}
        self.timed = True
        prompts = [record.request.text for record in self.cell.records[:TIMED]]
        found = added_latency(self.editor.view, self.editor.encoder, prompts, tokens=TIMED_TOKENS, rounds=1)
        return {"latency": found.to_json()}

    def _score(self, moment: str, start: int = 0, stop: int | None = None) -> None:
        """Score what is missing of some records, block by block."""
        records = self.cell.records
        stop = len(records) if stop is None else stop
        done = self.store.done(self.key, moment)
        for number, block in enumerate(_blocks(range(start, stop), BLOCK)):
            left = [position for position in block if position not in done]
            if not left or number % self.share[1] != self.share[0]:
                continue
            self.progress(f"scoring {moment}", block[0] - start, stop - start)
            rows = self._rows([records[position] for position in left])
            self.store.add(self.key, moment, dict(zip(left, rows, strict=True)))

    def _rows(self, records: Sequence[EditRecord]) -> tuple[RecordResult, ...]:
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


def _blocks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@contextmanager
def _on(editor: Editor, file: Path) -> Iterator[Edit]:
    """An edit from a file on the model while a block runs."""
    edit = load_edit(file)
    edit.attach(editor.model)
    try:
        yield edit
    finally:
        edit.revert(editor.model)


def _kept(edit: Edit) -> dict[str, Any]:
    """What an edit takes to keep, and whether it holds what earlier ones of its sequence hold."""
    return {"edit_bytes": edit_bytes(edit), "supersedes": isinstance(edit, EffectEdit) and edit.supersedes}


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Collect kecore's own warnings, which go into the store; others are raised again."""
    heard: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KecoreWarning)
        yield heard
    _sort(caught, heard)


def _sort(caught: Iterable[warnings.WarningMessage], heard: list[str]) -> None:
    for item in caught:
        if issubclass(item.category, KecoreWarning):
            heard.append(str(item.message))
        else:
            warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)
