"""Runs of stores: their scores, worked out from the stored answers, and their costs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from kecore.api.errors import ArtifactError, KecoreError
from kecore.api.line import MethodLine
from kecore.evaluate.answers import RecordResult
from kecore.evaluate.protocol import AT_END, Protocol
from kecore.evaluate.records import Skipped
from kecore.evaluate.result import Evaluation, Score, compare
from kecore_bench.published import PaperTable
from kecore_bench.store import BEFORE, Failure, RunSpec, Store

__all__ = ["Result", "Retained", "results", "versions"]


@dataclass(frozen=True)
class Retained:
    """A score of all facts that a sequence had edited at some step.

    Args:
        facts: how many these were.
        score: their score.
    """

    facts: int
    score: Score


@dataclass(frozen=True)
class Result:
    """One run as it stands in a store.

    Args:
        spec: what was run.
        protocol: by which protocol.
        made_on: versions, hardware, fingerprint.
        evaluations: scores by moment, compared with the unedited model where it was asked too.
        costs: what each edit cost.
        failures: what ended in an error.
        label: its name in tables.
        remark: how it differs from another run of the same name; empty where there is none.
        published: tables of papers that the store cites.
    """

    spec: RunSpec
    protocol: Protocol
    made_on: Mapping[str, Any]
    evaluations: Mapping[str, Evaluation]
    costs: Mapping[str, Mapping[str, Any]]
    failures: Sequence[Failure]
    label: str
    remark: str = ""
    published: Sequence[PaperTable] = ()

    @property
    def answer_count(self) -> int:
        """Number of records that were scored, at all moments together."""
        return sum(len(evaluation.rows) for evaluation in self.evaluations.values())

    @property
    def model(self) -> str:
        """The model's reference; of a path its last part, as the rest says nothing elsewhere."""
        return Path(self.spec.model).name if self.spec.model.startswith(("/", ".", "~")) else self.spec.model

    @property
    def edits(self) -> bool:
        """Whether the run edits the model, or only asks it."""
        return self.spec.method is not None or self.spec.edit is not None

    @property
    def left_out(self) -> list[Skipped]:
        """Place and reason of each record of the file that could not be represented."""
        stored = self.made_on["left_out"]
        if isinstance(stored, int):  # stores that were begun before these were kept
            reason = "not kept by the version of this store"
            return [Skipped(f"number {number}", reason) for number in range(1, stored + 1)]
        return [Skipped(where, reason) for where, reason in stored]

    @property
    def seconds(self) -> float | None:
        """Seconds of editing for each fact; None for an edit that was made elsewhere."""
        timed = [cost for cost in self.costs.values() if cost["seconds"] is not None]
        if not timed:
            return None
        seconds = sum(cost["seconds"] for cost in timed)
        facts = sum(cost["records"] for cost in timed)
        return seconds / facts

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of editing by stage."""
        seconds: dict[str, float] = defaultdict(float)
        for cost in self.costs.values():
            for name, value in cost["stages"].items():
                seconds[name] += value
        return dict(seconds)

    @property
    def peak_memory(self) -> int | None:
        """Most bytes that the process held during an edit, or, unless :attr:`peak_is_the_edits`, by its end."""
        peaks = [cost["peak_memory_bytes"] for cost in self.costs.values() if cost["peak_memory_bytes"]]
        return max(peaks, default=None)

    @property
    def peak_is_the_edits(self) -> bool:
        """Whether the peak of memory began anew with each edit."""
        return all(cost.get("peak_is_the_edits", cost["seconds"] is None) for cost in self.costs.values())

    @property
    def bytes_per_fact(self) -> float | None:
        """Bytes to keep for each fact: of all edits, or of a sequence of those that act at its end."""
        size = facts = 0
        for cost in self.costs.values():
            if "supersedes" not in cost:  # of a store of before such figures
                return None
            if self.protocol.edits == "sequential" and cost["supersedes"]:
                size = 0  # the edit holds what the earlier ones of its sequence hold
            size += cost["edit_bytes"]
            facts += cost["records"]
        return size / facts if facts else None

    @property
    def latency(self) -> dict[str, float] | None:
        """Seconds of a generated token by ``base``, ``edited`` and ``added``; None where it was not timed."""
        timings = [cost["latency"] for cost in self.costs.values() if "latency" in cost]
        if not timings:
            return None
        means: dict[str, float] = {}
        for key in timings[0]:
            means[key] = fmean(timing[key] for timing in timings)
        return means

    @property
    def warnings(self) -> list[str]:
        """Warnings of editing, each once."""
        texts: list[str] = []
        for cost in self.costs.values():
            texts += cost["warnings"]
        return list(dict.fromkeys(texts))

    def retention(self, key: str) -> list[Retained]:
        """Return a score of all facts edited so far: at the checkpoints of a sequence, and at its end."""
        points: list[Retained] = []
        for moment, evaluation in self.evaluations.items():
            if moment == AT_END:
                facts = self.spec.size
            elif moment.startswith("after-"):
                facts = int(moment.removeprefix("after-"))
            else:
                continue
            if key in evaluation.scores:
                points.append(Retained(facts, evaluation.scores[key]))
        return sorted(points, key=lambda point: point.facts)


def results(*stores: Store, keys: Collection[str] | None = None) -> list[Result]:
    """Return the runs of stores, each once, under labels that differ.

    Args:
        stores: where they are.
        keys: those to read; by default all.

    Raises:
        ArtifactError: a store holds none.
    """
    runs: dict[tuple[str, str], Result] = {}  # by protocol and key
    for store in stores:
        for result in _results_of(store, keys):
            run = (store.protocol.hash(), result.spec.key)
            if run not in runs or result.answer_count > runs[run].answer_count:
                runs[run] = result
    return _tell_apart(_leave_out_replaced(list(runs.values())))


def _results_of(store: Store, keys: Collection[str] | None) -> Iterator[Result]:
    specs = store.specs()
    if not specs:
        raise ArtifactError(f"{store.path} holds no results yet; fill it with `kecore bench`")
    unedited_rows: dict[tuple[str, str, int], Mapping[int, RecordResult]] = {}
    for spec in specs:
        if spec.method is None and not spec.edit:
            unedited_rows[spec.group] = store.rows(spec.key, BEFORE)
    for spec in specs:
        if keys is None or spec.key in keys:
            yield _read_result(store, spec, unedited_rows.get(spec.group, {}))


def _read_result(store: Store, spec: RunSpec, unedited_rows: Mapping[int, RecordResult]) -> Result:
    """Return a run, its scores compared with those of the unedited model where that answered the same records."""
    evaluations: dict[str, Evaluation] = {}
    for moment in store.moments(spec.key):
        rows = store.rows(spec.key, moment)
        if (
            moment == BEFORE
        ):  # others are there to be compared with at checkpoints; a row of a table is of the drawn ones
            drawn = {*store.protocol.drawn(spec.size)}
            rows = {position: row for position, row in rows.items() if position in drawn}
        if not rows:
            continue
        evaluation = Evaluation(store.protocol, tuple(rows.values()))
        if moment != BEFORE and rows.keys() <= unedited_rows.keys():
            unedited = Evaluation(store.protocol, tuple(unedited_rows[position] for position in rows))
            evaluation = compare(unedited, evaluation)
        evaluations[moment] = evaluation
    return Result(
        spec=spec,
        protocol=store.protocol,
        made_on=store.made_on(spec.key),
        evaluations=evaluations,
        costs=store.costs(spec.key),
        failures=store.failures(spec.key),
        label=_label_of(spec),
        published=store.published,
    )


def _label_of(spec: RunSpec) -> str:
    """Return a run's name in tables, with what is of its own where the method is a variant of the published one."""
    try:
        capabilities = MethodLine.of(spec.method or "").capabilities
    except KecoreError:  # a store may come from where other methods are installed
        return spec.label
    return capabilities.titled(spec.label)


def _leave_out_replaced(runs: Sequence[Result]) -> list[Result]:
    """Leave out runs without scores that another run of their name stands for.

    A baseline that was not installed at first, and is now, has two runs, of which one is empty. Of several empty ones
    the last stays.
    """
    scored = {_name_in_group(run) for run in runs if run.evaluations}
    last_of_name = {_name_in_group(run): run for run in runs}
    remaining: list[Result] = []
    for run in runs:
        name = _name_in_group(run)
        if run.evaluations or (name not in scored and last_of_name[name] is run):
            remaining.append(run)
    return remaining


def _name_in_group(run: Result) -> tuple[str, tuple[str, str, int], str]:
    return run.label, run.spec.group, run.protocol.hash()


def _tell_apart(runs: Sequence[Result]) -> list[Result]:
    """Put numbers after labels that occur twice in a group, and say how these runs differ from the first of them."""
    first_of_name: dict[tuple[Any, ...], Result] = {}
    counts: Counter[tuple[Any, ...]] = Counter()
    labelled: list[Result] = []
    for run in runs:
        name = _name_in_group(run)
        counts[name] += 1
        first = first_of_name.setdefault(name, run)
        if first is not run:
            remark = f"has other settings than the first ({_difference(run.spec, first.spec)})"
            run = replace(run, label=f"{run.label} #{counts[name]}", remark=remark)
        labelled.append(run)
    return labelled


def _difference(spec: RunSpec, first: RunSpec) -> str:
    """Return in words how a run differs from the first one of its name."""
    differences: list[str] = []
    for fields, first_fields in ((spec.config, first.config), (spec.statistics or {}, first.statistics or {})):
        for key in {**fields, **first_fields}:
            value, first_value = fields.get(key), first_fields.get(key)
            if value != first_value:
                differences.append(f"{key} {value}, there {first_value}")
    return "; ".join(differences) or "see their configurations"


def versions(runs: Sequence[Result], name: str) -> list[str]:
    """Return what the runs were made on, in words, each once: ``versions`` or ``hardware``."""
    descriptions: list[str] = []
    for run in runs:
        fields = sorted(run.made_on[name].items())
        descriptions.append(", ".join(f"{key} {value}" for key, value in fields))
    return list(dict.fromkeys(descriptions))
