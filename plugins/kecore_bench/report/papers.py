"""Rows of papers among the rows of runs: which belong into a table, where, and how they differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kecore.api.errors import KecoreError
from kecore.api.line import MethodLine
from kecore_bench.published import PaperTable

if TYPE_CHECKING:
    from kecore_bench.report.results import Result
    from kecore_bench.report.table import Row, Table
    from kecore_bench.store import RunSpec

__all__ = ["PaperRow", "citations", "cite", "cited", "lines"]

_UNEDITED = "unedited"


@dataclass(frozen=True)
class PaperRow:
    """A line of a paper's table.

    Args:
        method: its name there, as plans call it.
        number: place of the paper among those that a table cites, from 1.
        paper: the paper's table.
        beside: label of the run below which it stands; empty where the method was not run.
    """

    method: str
    number: int
    paper: PaperTable
    beside: str = ""

    @property
    def label(self) -> str:
        """Name of the row in a table, with the number of its citation."""
        return f"{self.method} [{self.number}]"

    @property
    def scores(self) -> Mapping[str, float]:
        """Its figures in kecore's unit."""
        return self.paper.scores(self.method)

    def printed(self, key: str) -> str:
        """Write a figure as the paper prints it."""
        return f"{self.paper.rows[self.method][key]:g}"


def cited(papers: Iterable[PaperTable], model: str, data: str, moment: str) -> list[PaperTable]:
    """Return the papers' tables that stand beside runs: those on their data set, of these those on their model if any.

    Args:
        papers: all that a store cites.
        model: the runs' model.
        data: name of their data set.
        moment: when they were scored.
    """
    fitting: list[PaperTable] = []
    for paper in papers:
        if paper.data.casefold() in data.casefold() and paper.moment in ("", moment):
            fitting.append(paper)
    on_model = [paper for paper in fitting if _is_on_model(paper, model)]
    return on_model or fitting


def _is_on_model(paper: PaperTable, model: str) -> bool:
    return paper.model.casefold() in model.casefold()


def lines(table: Table) -> list[Row | PaperRow]:
    """Return the rows of a table, each followed by those of papers for its method; at the end those without a run."""
    paper_rows: list[PaperRow] = []
    for number, paper in enumerate(table.cited, 1):
        paper_rows += [PaperRow(method, number, paper) for method in paper.rows]
    last_index: dict[str, int] = {}  # of the rows that a paper's method may mean, the last
    for index, row in enumerate(table.rows):
        for name in _names(row):
            last_index[name] = index
    ordered: list[Row | PaperRow] = []
    for index, row in enumerate(table.rows):
        ordered.append(row)
        for paper_row in paper_rows:
            if last_index.get(paper_row.method) == index:
                ordered.append(replace(paper_row, beside=row.label))
    return ordered + [paper_row for paper_row in paper_rows if paper_row.method not in last_index]


def _names(row: Row) -> list[str]:
    """Return the names that papers' rows may have for a run: its label, and its method or that it is unedited."""
    spec = row.result.spec
    if spec.method is not None:
        return [row.label, spec.label, spec.method]
    return [row.label] if row.result.edits else [row.label, _UNEDITED]


def citations(table: Table) -> list[str]:
    """Say where the papers' rows come from, and how their conditions differ from those of the runs."""
    return [f"[{number}] {cite(paper, table)}" for number, paper in enumerate(table.cited, 1)]


def cite(paper: PaperTable, table: Table) -> str:
    """Say where a paper's rows come from, and how its conditions differ from those of a table's runs."""
    source = [paper.paper]
    if paper.arxiv:
        source.append(f"arXiv {paper.arxiv}")
    if paper.table:
        source.append(paper.table)
    text = ", ".join(source)
    conditions = [paper.model, f"{paper.records:,} records" if paper.records else "", paper.setting]
    if any(conditions):
        text += f": {', '.join(filter(None, conditions))}"
    text += "."
    differences = _differences(paper, table.first)
    if differences:
        text += f" Here: {', '.join(differences)}."
    own = _with_own_settings(paper, table)
    if own:
        text += f" With kecore's own settings, not published ones: {', '.join(own)}."
    return f"{text} {paper.remark}".rstrip()


def _with_own_settings(paper: PaperTable, table: Table) -> list[str]:
    """Return the labels of the rows beside which a paper's stand, and that no published set-up was taken for."""
    labels: list[str] = []
    for row in table.rows:
        spec = row.result.spec
        if spec.method is not None and paper.rows.keys() & set(_names(row)) and not _is_published(spec):
            labels.append(row.label)
    return labels


def _is_published(spec: RunSpec) -> bool:
    """Return whether a run's configuration holds a published set-up of its method."""
    try:
        presets = MethodLine.of(spec.method or "").method.Config.presets().values()
    except KecoreError:  # a store may come from where other methods are installed
        return False
    return any(preset.fields.items() <= spec.config.items() for preset in presets)


def _differences(paper: PaperTable, result: Result) -> list[str]:
    """Return what model and number of records a table's runs have, where the paper's are other ones."""
    differences: list[str] = []
    spec = result.spec
    if not _is_on_model(paper, spec.model):
        differences.append(result.model)
    if paper.records and paper.records != spec.size:
        differences.append(f"{spec.size:,} record{'' if spec.size == 1 else 's'}")
    return differences
