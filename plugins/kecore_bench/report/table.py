"""Tables of runs: methods on the same records of one data set, with one model, by one protocol."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kecore.api.errors import ProtocolMismatchError
from kecore.evaluate.columns import Column, columns_of, described, in_order
from kecore.evaluate.protocol import AFTER, AT_EDIT, AT_END, same_protocol
from kecore.evaluate.result import Evaluation, Score
from kecore_bench.published import PaperTable
from kecore_bench.report.costs import COSTS, Cost
from kecore_bench.report.papers import cited
from kecore_bench.report.results import Result
from kecore_bench.report.seeds import same_but_seed
from kecore_bench.store import BEFORE

__all__ = ["MOMENTS", "Row", "Table", "count_records", "last_moments", "tables"]

MOMENTS = {
    BEFORE: "before the edit",
    AFTER: "after the edit",
    AT_EDIT: "at-edit: each fact right after its own step",
    AT_END: "at-end: all facts after the last step",
}


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
        """Name of the run in tables."""
        return self.result.label

    @property
    def scores(self) -> Mapping[str, Score]:
        """Scores of the run at the table's moment."""
        return self.evaluation.scores if self.evaluation else {}

    @property
    def note(self) -> str:
        """Description of what is missing of the run; empty where nothing is."""
        failures = self.result.failures
        if failures and failures[0].kind == "MethodNotFoundError":
            return "not installed"
        remarks: list[str] = []
        if self.result.remark:
            remarks.append(self.result.remark)
        count = len(self.evaluation.rows) if self.evaluation else 0
        wanted = len(self.result.protocol.drawn(self.result.spec.size))
        if count < wanted:
            unfinished = "" if failures else "unfinished, "
            remarks.append(f"{unfinished}{count} of {wanted} records")
        if failures:
            first = failures[0]
            where = "" if first.part == "all" else f"{len(failures)} failed, the first at {first.part}: "
            remarks.append(f"{where}{first.kind}: {first.message}")
        return "; ".join(remarks)

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON values, with every score and cost."""
        result = self.result
        failures = [[failure.part, failure.kind, failure.message] for failure in result.failures]
        return {
            "method": self.label,
            "records": len(self.evaluation.rows) if self.evaluation else 0,
            "scores": {key: score.to_json() for key, score in self.scores.items()},
            "seconds_per_fact": result.seconds,
            "stages": result.stages,
            "peak_memory_bytes": result.peak_memory,
            "peak_is_the_edits": result.peak_is_the_edits,
            "bytes_per_fact": result.bytes_per_fact,
            "seconds_per_token": result.latency,
            "failures": failures,
            "warnings": result.warnings,
        }


@dataclass(frozen=True)
class Table:
    """Methods on the same records of one data set, with one model, by one protocol, at one moment.

    Make it with :func:`tables`.

    Args:
        rows: one a method.
        moment: when they were scored.
        keys: scores to head columns, in this order; by default those of the main table, and all others further below.
        seed: seed that the title names, where tables of several seeds stand beside each other.
        costs: costs to head the last columns.
    """

    rows: tuple[Row, ...]
    moment: str
    keys: Sequence[str] | None = None
    seed: int | None = None
    costs: tuple[Cost, ...] = COSTS

    def __post_init__(self) -> None:
        first = self.rows[0].result
        for row in self.rows[1:]:
            same_protocol(first.protocol, row.result.protocol, f"'{first.label}' and '{row.label}'")
            if row.result.spec.group != first.spec.group:
                raise ProtocolMismatchError(
                    f"'{first.label}' and '{row.label}' are of different models, data sets or numbers of records; "
                    "a table has one of each"
                )

    @cached_property
    def columns(self) -> Mapping[str, str]:
        """Headings of the main table's scores by key.

        These are the core metrics of the protocol that some row has, and those of the papers that are cited.
        """
        printed = self._printed_keys
        if self.keys is not None:
            return {key: self.heading(key) for key in self.keys}
        headings: dict[str, str] = {}
        for key, column in self.described.items():
            if key in printed or (column.core and key in self.scored_keys):
                headings[key] = column.heading
        for key in printed:
            headings.setdefault(key, self.heading(key))
        return headings

    def heading(self, key: str) -> str:
        """Return what stands above the column of a score; papers may have scores that the protocol does not take."""
        if key.partition(".")[0] in self.described:
            return described(self.described, key).heading
        return key.replace("_", " ")

    def shows(self, key: str) -> bool:
        """Return whether a score is to be shown: all are, unless some were chosen."""
        return self.keys is None or key in self.keys

    @property
    def scored_keys(self) -> set[str]:
        """Keys of the scores that some row has, those of axes included."""
        keys: set[str] = set()
        for row in self.rows:
            keys |= row.scores.keys()
        return keys

    @property
    def _printed_keys(self) -> list[str]:
        """Metrics of the papers that are cited, each once."""
        keys: list[str] = []
        for paper in self.cited:
            for figures in paper.rows.values():
                keys += figures
        return list(dict.fromkeys(keys))

    @cached_property
    def described(self) -> Mapping[str, Column]:
        """Name and meaning of each of the protocol's scores."""
        return columns_of(self.first.protocol)

    @cached_property
    def further(self) -> list[str]:
        """Keys of the scores that are not among the columns, those of axes included, in order; none of a choice."""
        if self.keys is not None:
            return []
        return in_order(self.described, self.scored_keys - self.columns.keys())

    @property
    def first(self) -> Result:
        """First run of the table; all have its model, data set and protocol."""
        return self.rows[0].result

    @cached_property
    def cited(self) -> list[PaperTable]:
        """Tables of papers whose rows stand among those of this table."""
        papers: list[PaperTable] = []
        for row in self.rows:
            papers += [paper for paper in row.result.published if paper not in papers]
        spec = self.first.spec
        return cited(papers, spec.model, spec.data["name"], self.moment)

    @cached_property
    def title(self) -> str:
        """Model, data set, number of records, and the moment where there are several."""
        spec = self.first.spec
        texts = [self.first.model, f"{count_records(spec.size)} of {spec.data['name']}"]
        texts += [spec.data[name] for name in ("split", "variant") if name in spec.data]
        if self.moment != AFTER:
            texts.append(MOMENTS[self.moment].partition(":")[0])
        if self.seed is not None:
            texts.append(f"seed {self.seed}")
        return ", ".join(texts)

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON values, with every score and not only the columns."""
        spec = self.first.spec
        papers = [paper.model_dump(mode="json", exclude_defaults=True) for paper in self.cited]
        return {
            "model": self.first.model,
            "data": dict(spec.data),
            "records": spec.size,
            "moment": self.moment,
            "protocol": {**self.first.protocol.to_json(), "hash": self.first.protocol.hash()},
            "rows": [row.to_json() for row in self.rows],
            "published": papers,
        }


def tables(runs: Iterable[Result]) -> list[Table]:
    """Return one table for each model, data set, number of records, moment and seed.

    Raises:
        ProtocolMismatchError: the runs follow protocols that differ by more than the seed.
    """
    groups: dict[tuple[object, ...], list[Result]] = {}
    first: Result | None = None
    for run in runs:
        if first is None:
            first = run
        same_but_seed(first.protocol, run.protocol, f"'{first.label}' and '{run.label}'")
        groups.setdefault((run.spec.group, run.protocol.hash()), []).append(run)
    seeds = {run.protocol.seed for group in groups.values() for run in group}
    all_tables: list[Table] = []
    for group in groups.values():
        has_edits = any(run.edits for run in group)
        moments = group[0].protocol.moments if has_edits else (BEFORE,)
        seed = group[0].protocol.seed if len(seeds) > 1 else None
        all_tables += [_table_of(group, moment, seed) for moment in moments]
    return all_tables


def _table_of(group: Sequence[Result], moment: str, seed: int | None) -> Table:
    """Return the table of a moment; the unedited model, which has one moment, stands in each."""
    rows: list[Row] = []
    for run in group:
        moment_of_run = moment if run.edits else BEFORE
        rows.append(Row(run, run.evaluations.get(moment_of_run)))
    return Table(tuple(rows), moment, seed=seed)


def last_moments(tables: Iterable[Table]) -> list[Table]:
    """Return the table of the last moment of each model, data set, size and seed."""
    last_of_group = {(table.first.spec.group, table.first.protocol.hash()): table for table in tables}
    return list(last_of_group.values())


def count_records(count: int) -> str:
    """Return ``1 record`` or ``20 records``."""
    return f"{count} record" if count == 1 else f"{count} records"
