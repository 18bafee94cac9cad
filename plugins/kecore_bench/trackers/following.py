"""Tells a tracker what a bench does, as far as its store shows it.

Whoever does the work, this process, others of it or other ranks, writes to the store; so one look at the store serves
all of them.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any

from kecore.api.errors import KecoreWarning
from kecore.evaluate.held_out import Drift
from kecore.evaluate.protocol import AFTER, AT_END
from kecore_bench.cells import Cell
from kecore_bench.report.costs import COSTS
from kecore_bench.report.results import Result, results
from kecore_bench.store import BEFORE, Store
from kecore_bench.trackers.base import TrackedRun, Tracker

__all__ = ["CUT_OFF", "Follower", "follow"]

CUT_OFF = "cut off; the same command goes on"
"""Why a run ended that has neither all its results nor an error."""
_LARGEST = 256 * 2**20
"""Bytes of a store up to which it is attached."""


@dataclass
class _Told:
    """What a tracker was told of a cell.

    Args:
        run: the run, as trackers know it.
        parts: parts of the cell whose cost was told.
        moments: moments whose scores were told.
    """

    run: TrackedRun
    parts: set[str] = field(default_factory=set)
    moments: set[str] = field(default_factory=set)


class Follower:
    """Follows the cells of a bench that are not done when it begins.

    Args:
        tracker: who is told.
        cells: the cells of the plan.
        store: where their results go.
    """

    def __init__(self, tracker: Tracker, cells: Sequence[Cell], store: Store) -> None:
        self._tracker: Tracker | None = tracker
        self._store = store
        self._pending = {cell.spec.key: cell for cell in cells if cell.missing(store)}
        self._open: dict[str, _Told] = {}
        self._bench = TrackedRun(
            key=sha256(f"{store.path.stem} {store.protocol.hash()}".encode()).hexdigest()[:24],
            name=f"bench {store.path.stem}",
            bench=store.path.stem,
            config={"runs": len(cells), "runs_to_do": len(self._pending), **_protocol_config(store)},
        )

    def begin(self) -> None:
        """Open the run of the bench itself."""
        self._tell(lambda tracker: tracker.start(self._bench))

    def look(self, ended: str = "") -> None:
        """Tell what is new in the store.

        Args:
            ended: key of a cell that nothing more is done of, be it finished or failed.
        """
        if self._tracker is None:
            return
        begun = {spec.key for spec in self._store.specs()}
        for key, cell in list(self._pending.items()):
            if key not in begun:
                continue
            told = self._open.get(key) or self._start(cell)
            is_done = not cell.missing(self._store)
            self._tell_costs(cell, told)
            self._tell_scores(cell, told)
            if is_done or key == ended:
                self._finish(cell, told, is_done)

    def end(self) -> None:
        """Close every run that is open, and attach the store to that of the bench."""
        self.look()
        failure = CUT_OFF if self._pending else ""
        for key, told in list(self._open.items()):
            self._finish(self._pending[key], told, is_done=False)
        path = self._store.path
        if self._store.on_disk and path.is_file() and path.stat().st_size <= _LARGEST:
            self._tell(lambda tracker: tracker.attach(self._bench, path))
        self._tell(lambda tracker: tracker.finish(self._bench, failure))

    def _start(self, cell: Cell) -> _Told:
        spec = cell.spec
        config = {
            **_flat(asdict(spec)),
            **_flat({"made_on": self._store.made_on(spec.key)}),
            **_protocol_config(self._store),
        }
        name = f"{spec.label}, {spec.model}, {spec.data['name']}, {spec.size}"
        told = _Told(TrackedRun(spec.key, name, self._bench.bench, config, parent=self._bench.key))
        self._open[spec.key] = told
        self._tell(lambda tracker: tracker.start(told.run))
        return told

    def _tell_costs(self, cell: Cell, told: _Told) -> None:
        """Tell what the steps of a sequence cost, each once."""
        if self._store.protocol.edits != "sequential":
            return
        for part, cost in self._store.costs(cell.spec.key).items():
            if part in told.parts or not part.startswith("step-"):
                continue
            told.parts.add(part)
            facts = min(int(part.removeprefix("step-")) * self._store.protocol.step, cell.spec.size)
            values = {"step/seconds": cost["seconds"], "step/bytes": cost["edit_bytes"]}
            if "held_out" in cost:
                drift = Drift.from_json(cost["held_out"])
                values |= {"step/perplexity": drift.perplexity, "step/agreement": drift.agreement}
            self._log(told, values, facts)

    def _tell_scores(self, cell: Cell, told: _Told) -> None:
        """Tell the scores of moments that are complete, each once, in the order of the facts edited by then."""
        wanted = cell.wanted(self._store.protocol)
        complete: list[str] = []
        for moment, count in wanted.items():
            if moment not in told.moments and len(self._store.done(cell.spec.key, moment)) >= count:
                complete.append(moment)
        if not complete:
            return
        result = self._result(cell)
        for moment in sorted(complete, key=lambda moment: _facts_by(moment, cell.spec.size)):
            told.moments.add(moment)
            if result is not None and moment in result.evaluations:
                self._log(told, _scores(result, moment), _facts_by(moment, cell.spec.size))

    def _finish(self, cell: Cell, told: _Told, is_done: bool) -> None:
        key = cell.spec.key
        result = self._result(cell)
        if result is not None:
            self._log(told, {cost.key: cost.read(result) for cost in COSTS}, cell.spec.size if result.edits else 0)
        failures = self._store.failures(key)
        failure = "" if is_done else CUT_OFF
        if failures:
            failure = f"{len(failures)} failed, the first: {failures[0].kind}: {failures[0].message}"
        self._tell(lambda tracker: tracker.finish(told.run, failure))
        del self._open[key], self._pending[key]

    def _result(self, cell: Cell) -> Result | None:
        found = results(self._store, keys={cell.spec.key})
        return found[0] if found else None

    def _log(self, told: _Told, values: Mapping[str, float | None], step: int) -> None:
        metrics = {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
        if metrics:
            self._tell(lambda tracker: tracker.log(told.run, metrics, step))

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        """Call the tracker; the first failure is said, and ends the tracking."""
        if self._tracker is None:
            return
        try:
            with redirect_stdout(sys.stderr):  # stdout carries the result
                call(self._tracker)
        except Exception as error:  # noqa: BLE001 - whatever a tracker's library raises must not end hours of work
            name = type(self._tracker).__name__
            self._tracker = None
            warnings.warn(
                f"the tracker {name} failed and is told nothing further ({type(error).__name__}: {error}); the bench "
                "goes on, and its results are in the store",
                KecoreWarning,
                stacklevel=2,
            )


@contextmanager
def follow(trackers: Sequence[Tracker], cells: Sequence[Cell], store: Store) -> Iterator[Callable[[str], None]]:
    """Tell trackers what happens while a block runs.

    Yields:
        A function that looks at the store, to be called with the key of a cell that has ended, or an empty text.
    """
    followers = [Follower(tracker, cells, store) for tracker in trackers]
    for follower in followers:
        follower.begin()

    def look(ended: str = "") -> None:
        for follower in followers:
            follower.look(ended)

    try:
        yield look
    finally:
        for follower in followers:
            follower.end()


def _facts_by(moment: str, size: int) -> int:
    """Return the number of facts that were edited by a moment, of ``size`` in all."""
    if moment == BEFORE:
        return 0
    return int(moment.removeprefix("after-")) if moment.startswith("after-") else size


def _scores(result: Result, moment: str) -> dict[str, float | None]:
    """Return the scores of a moment by name: plain ones after one edit, others with what they are of before a slash."""
    prefixes = [""] if moment in (AFTER, BEFORE) else [f"{moment}/"]
    if moment == AT_END:
        prefixes.append("so-far/")  # the end of the retention curve
    elif moment.startswith("after-"):
        prefixes = ["so-far/"]
    values: dict[str, float | None] = {}
    for key, score in result.evaluations[moment].scores.items():
        for prefix in prefixes:
            values[f"{prefix}{key}"] = score.value
    return values


def _protocol_config(store: Store) -> dict[str, Any]:
    return {"protocol_hash": store.protocol.hash(), **_flat({"protocol": store.protocol.to_json()})}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values under dotted names; lists as texts, what is None or empty left out."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            flat[f"{prefix}{name}"] = ", ".join(map(str, value))
        elif value is not None:
            flat[f"{prefix}{name}"] = value
    return flat
