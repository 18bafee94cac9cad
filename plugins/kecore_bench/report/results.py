"""From the answers in a store to scores and tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from kecore.api.errors import ArtifactError, ProtocolMismatchError
from kecore.evaluate.answers import RecordResult
from kecore.evaluate.columns import Column, columns_of, in_order
from kecore.evaluate.protocol import AFTER, AT_EDIT, AT_END, Protocol, same_protocol
from kecore.evaluate.result import Evaluation, Score, compare
from kecore_bench.published import PaperTable
from kecore_bench.report.papers import cited
from kecore_bench.store import BEFORE, Failure, RunSpec, Store

__all__ = ["MOMENTS", "Result", "Row", "Table", "last_moments", "results", "tables", "versions"]

MOMENTS = {
    BEFORE: "before the edit",
    AFTER: "after the edit",
    AT_EDIT: "at-edit: each fact right after its own step",
    AT_END: "at-end: all facts after the last step",
}


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
        remark: what tells it from another run of the same name; empty where there is none.
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
    def answered(self) -> int:
        """Number of records, at all moments."""
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
    def left_out(self) -> list[tuple[str, str]]:
        """Place and reason of each record of the file that could not be represented."""
        found = self.made_on["left_out"]
        if isinstance(found, int):  # stores that were begun before these were kept
            return [(f"number {place}", "not kept by the version of this store") for place in range(1, found + 1)]
        return [(where, why) for where, why in found]

    @property
    def seconds(self) -> float | None:
        """Seconds of editing for each fact; None for an edit that was made elsewhere."""
        timed = [cost for cost in self.costs.values() if cost["seconds"] is not None]
        return sum(cost["seconds"] for cost in timed) / sum(cost["records"] for cost in timed) if timed else None

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of editing by stage."""
        found: dict[str, float] = {}
        for cost in self.costs.values():
            for name, seconds in cost["stages"].items():
                found[name] = found.get(name, 0.0) + seconds
        return found

    @property
    def peak_memory(self) -> int | None:
        """Most bytes that the process held during an edit, or, unless :attr:`peak_is_the_edits`, by its end."""
        return max((cost["peak_memory_bytes"] or 0 for cost in self.costs.values()), default=0) or None

    @property
    def peak_is_the_edits(self) -> bool:
        """Whether the peak of memory began anew with each edit."""
        return all(cost.get("peak_is_the_edits", cost["seconds"] is None) for cost in self.costs.values())

    @property
    def bytes_per_fact(self) -> float | None:
        """Bytes to keep for each fact: of all edits, or of a sequence of those that act at its end."""
        kept, facts = 0, 0
        for cost in self.costs.values():
            if "supersedes" not in cost:  # of a store of before such figures
                return None
            replaces = self.protocol.edits == "sequential" and cost["supersedes"]
            kept = cost["edit_bytes"] + (0 if replaces else kept)
            facts += cost["records"]
        return kept / facts if facts else None

    @property
    def latency(self) -> dict[str, float] | None:
        """Seconds of a generated token by ``base``, ``edited`` and ``added``; None where it was not timed."""
        found = [cost["latency"] for cost in self.costs.values() if "latency" in cost]
        return {key: fmean(times[key] for times in found) for key in found[0]} if found else None

    @property
    def warnings(self) -> list[str]:
        """What editing warned of, each once."""
        return list(dict.fromkeys(text for cost in self.costs.values() for text in cost["warnings"]))

    def retention(self, key: str) -> list[tuple[int, Score]]:
        """A score of all facts edited so far, by their number: the checkpoints of a sequence, and its end."""
        named = [(int(name.partition("-")[2]), name) for name in self.evaluations if name.startswith("after-")]
        if AT_END in self.evaluations:
            named.append((self.spec.size, AT_END))
        points = [(count, self.evaluations[name].scores.get(key)) for count, name in sorted(named)]
        return [(count, score) for count, score in points if score is not None]


def results(*stores: Store, keys: Collection[str] | None = None) -> list[Result]:
    """The runs of stores, each once, under labels that differ.

    Args:
        stores: where they are.
        keys: those to read; by default all.

    Raises:
        ArtifactError: a store holds none.
    """
    found: dict[tuple[str, str], Result] = {}
    for store in stores:
        specs = store.specs()
        if not specs:
            raise ArtifactError(f"{store.path} holds no results yet; fill it with `kecore bench`")
        plain = {spec.group: store.rows(spec.key, BEFORE) for spec in specs if spec.method is None and not spec.edit}
        for spec in specs:
            if keys is None or spec.key in keys:
                result = _result(store, spec, plain.get(spec.group, {}))
                place = (store.protocol.hash(), spec.key)
                if place not in found or result.answered > found[place].answered:
                    found[place] = result
    made = list(found.values())
    last = {(result.label, result.spec.group): place for place, result in enumerate(made)}
    told = {(result.label, result.spec.group) for result in made if result.evaluations}

    def counts(place: int, result: Result) -> bool:
        # A baseline that was not installed at first, and is now, has two runs, of which one is empty.
        name = (result.label, result.spec.group)
        return bool(result.evaluations) or (name not in told and last[name] == place)

    return _told_apart([result for place, result in enumerate(made) if counts(place, result)])


def _told_apart(found: Sequence[Result]) -> list[Result]:
    """Runs with numbers after labels that occur twice in a group, and how they differ from the first of them."""
    first: dict[tuple[Any, ...], Result] = {}
    counts: Counter[tuple[Any, ...]] = Counter()
    made: list[Result] = []
    for result in found:
        place = (result.label, result.spec.group)
        counts[place] += 1
        other = first.setdefault(place, result)
        if other is not result:
            text = f"has other settings than the first ({_difference(result.spec, other.spec)})"
            result = replace(result, label=f"{result.label} #{counts[place]}", remark=text)
        made.append(result)
    return made


def _difference(one: RunSpec, other: RunSpec) -> str:
    pairs = [(one.config, other.config), (one.statistics or {}, other.statistics or {})]
    parts = [
        f"{key} {mine.get(key)}, there {theirs.get(key)}"
        for mine, theirs in pairs
        for key in {**mine, **theirs}
        if mine.get(key) != theirs.get(key)
    ]
    return "; ".join(parts) or "see their configurations"


def _result(store: Store, spec: RunSpec, before: Mapping[int, RecordResult]) -> Result:
    evaluations: dict[str, Evaluation] = {}
    for moment in store.moments(spec.key):
        rows = store.rows(spec.key, moment)
        if not rows:
            continue
        found = Evaluation(store.protocol, tuple(rows.values()))
        # Over other records than the unedited model answered there is nothing to compare with.
        if moment != BEFORE and rows.keys() <= before.keys():
            found = compare(Evaluation(store.protocol, tuple(before[place] for place in rows)), found)
        evaluations[moment] = found
    key = spec.key
    return Result(
        spec, store.protocol, store.made_on(key), evaluations, store.costs(key), store.failures(key), spec.label,
        published=store.published,
    )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Args:
        result: the run.
        evaluation: its scores at the table's moment; None where there are none.
    """

    result: Result
    evaluation: Evaluation | None

    @property
    def label(self) -> str:
        """What it is called."""
        return self.result.label

    @property
    def scores(self) -> Mapping[str, Score]:
        """Its scores."""
        return self.evaluation.scores if self.evaluation else {}

    @property
    def note(self) -> str:
        """What is missing of it; empty where nothing is."""
        failures, count = self.result.failures, len(self.evaluation.rows) if self.evaluation else 0
        parts = [self.result.remark] if self.result.remark else []
        if count < self.result.spec.size:
            unfinished = "" if failures else "unfinished, "
            parts.append(f"{unfinished}{count} of {self.result.spec.size} records")
        if failures:
            first = failures[0]
            if first.kind == "MethodNotFoundError":
                return "not installed"
            where = "" if first.part == "all" else f"{len(failures)} failed, the first at {first.part}: "
            parts.append(f"{where}{first.kind}: {first.message}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Table:
    """Methods on the same records of one data set, with one model, by one protocol, at one moment.

    Make it with :func:`tables`.

    Args:
        rows: one a method.
        moment: when they were scored.
        columns: scores of the main table and their headings; by default the core metrics of the protocol that some
            row has, and what else the papers have that it stands beside.
    """

    rows: tuple[Row, ...]
    moment: str
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = self.rows[0].result
        for row in self.rows[1:]:
            same_protocol(first.protocol, row.result.protocol, f"'{first.label}' and '{row.label}'")
            if row.result.spec.group != first.spec.group:
                raise ProtocolMismatchError(
                    f"'{first.label}' and '{row.label}' are of different models, data sets or numbers of records; "
                    "a table has one of each"
                )
        if not self.columns:
            printed = dict.fromkeys(key for paper in self.cited for row in paper.rows.values() for key in row)
            found = self._found | printed.keys()
            columns = {
                key: c.heading for key, c in self.described.items() if key in found and (c.core or key in printed)
            }
            more = {key: key.replace("_", " ") for key in printed if key not in columns}
            object.__setattr__(self, "columns", columns | more)

    @property
    def _found(self) -> set[str]:
        return {key for row in self.rows for key in row.scores}

    @cached_property
    def described(self) -> Mapping[str, Column]:
        """What the protocol's scores are called and mean."""
        return columns_of(self.first.protocol)

    @cached_property
    def further(self) -> list[str]:
        """Scores that are not among the columns, those of axes included, in order."""
        return in_order(self.described, self._found - self.columns.keys())

    @property
    def first(self) -> Result:
        """A run that has the model, data set and protocol of all."""
        return self.rows[0].result

    @cached_property
    def cited(self) -> list[PaperTable]:
        """The tables of papers whose rows stand among its own."""
        every = [paper for row in self.rows for paper in row.result.published]
        unlike = [paper for place, paper in enumerate(every) if paper not in every[:place]]
        spec = self.first.spec
        return cited(unlike, spec.model, spec.data["name"], self.moment)

    @cached_property
    def title(self) -> str:
        """Model, data set, number of records, and the moment where there are several."""
        spec = self.first.spec
        when = f", {MOMENTS[self.moment].partition(':')[0]}" if self.moment != AFTER else ""
        part = "".join(f", {spec.data[name]}" for name in ("split", "variant") if name in spec.data)
        count = f"{spec.size} record{'' if spec.size == 1 else 's'}"
        return f"{self.first.model}, {count} of {spec.data['name']}{part}{when}"

    def to_json(self) -> dict[str, Any]:
        """The table as JSON values, with every score and not only the columns."""
        spec = self.first.spec
        return {
            "model": self.first.model,
            "data": dict(spec.data),
            "records": spec.size,
            "moment": self.moment,
            "protocol": {**self.first.protocol.to_json(), "hash": self.first.protocol.hash()},
            "rows": [
                {
                    "method": row.label,
                    "records": len(row.evaluation.rows) if row.evaluation else 0,
                    "scores": {key: score.to_json() for key, score in row.scores.items()},
                    "seconds_per_fact": row.result.seconds,
                    "stages": row.result.stages,
                    "peak_memory_bytes": row.result.peak_memory,
                    "peak_is_the_edits": row.result.peak_is_the_edits,
                    "bytes_per_fact": row.result.bytes_per_fact,
                    "seconds_per_token": row.result.latency,
                    "failures": [[f.part, f.kind, f.message] for f in row.result.failures],
                    "warnings": row.result.warnings,
                }
                for row in self.rows
            ],
            "published": [paper.model_dump(mode="json", exclude_defaults=True) for paper in self.cited],
        }


def tables(found: Iterable[Result]) -> list[Table]:
    """One table for each model, data set, number of records and moment.

    Raises:
        ProtocolMismatchError: the runs follow different protocols.
    """
    every = list(found)
    for result in every[1:]:
        same_protocol(every[0].protocol, result.protocol, f"'{every[0].label}' and '{result.label}'")
    groups: dict[tuple[str, str, int], list[Result]] = {}
    for result in every:
        groups.setdefault(result.spec.group, []).append(result)
    made: list[Table] = []
    for group in groups.values():
        edited = any(result.edits for result in group)
        for moment in group[0].protocol.moments if edited else (BEFORE,):
            rows = (Row(r, r.evaluations.get(moment if r.edits else BEFORE)) for r in group)
            made.append(Table(tuple(rows), moment))
    return made


def last_moments(made: Iterable[Table]) -> list[Table]:
    """Of each model, data set and size the table of the last moment."""
    return list({table.first.spec.group: table for table in made}.values())


def versions(found: Sequence[Result], name: str) -> list[str]:
    """What the runs were made on, in words, each once: ``versions`` or ``hardware``."""
    seen = dict.fromkeys(json.dumps(result.made_on[name], sort_keys=True) for result in found)
    return [", ".join(f"{key} {value}" for key, value in json.loads(text).items()) for text in seen]
