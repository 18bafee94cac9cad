"""Rows of papers among the rows of runs: which belong into a table, where, and how they differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kecore_bench.published import PaperTable

if TYPE_CHECKING:
    from kecore_bench.report.results import Row, Table

__all__ = ["PaperRow", "citations", "cited", "lines"]

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
        """What it is called in a table, with the number of its citation."""
        return f"{self.method} [{self.number}]"

    @property
    def scores(self) -> Mapping[str, float]:
        """Its figures in kecore's unit."""
        return self.paper.scores(self.method)

    def printed(self, key: str) -> str:
        """A figure as the paper prints it."""
        return f"{self.paper.rows[self.method][key]:g}"


def cited(papers: Iterable[PaperTable], model: str, data: str, moment: str) -> list[PaperTable]:
    """The tables that a table of runs stands beside: those on its data set, and of these those on its model, if any.

    Args:
        papers: all that a store cites.
        model: the runs' model.
        data: name of their data set.
        moment: when they were scored.
    """
    fitting = [
        paper
        for paper in papers
        if paper.data.casefold() in data.casefold() and (not paper.moment or paper.moment == moment)
    ]
    return [paper for paper in fitting if _of(paper, model)] or fitting


def _of(paper: PaperTable, model: str) -> bool:
    return paper.model.casefold() in model.casefold()


def lines(table: Table) -> list[Row | PaperRow]:
    """The rows of a table, each followed by those of papers for the same method; at the end those without a run."""
    papers = [PaperRow(method, number, paper) for number, paper in enumerate(table.cited, 1) for method in paper.rows]
    last = {name: place for place, row in enumerate(table.rows) for name in _names(row)}
    found: list[Row | PaperRow] = []
    for place, row in enumerate(table.rows):
        found.append(row)
        found += [replace(paper, beside=row.label) for paper in papers if last.get(paper.method) == place]
    return found + [paper for paper in papers if paper.method not in last]


def _names(row: Row) -> Sequence[str]:
    return row.label, row.result.spec.method or (row.label if row.result.edits else _UNEDITED)


def citations(table: Table) -> list[str]:
    """Where the papers' rows come from, and how their conditions differ from those of the runs, in sentences."""
    return [f"[{number}] {_cite(paper, table)}" for number, paper in enumerate(table.cited, 1)]


def _cite(paper: PaperTable, table: Table) -> str:
    place = [paper.paper, f"arXiv {paper.arxiv}" if paper.arxiv else "", paper.table]
    count = f"{paper.records:,} records" if paper.records else ""
    how = ", ".join(part for part in (paper.model, count, paper.setting) if part)
    text = ", ".join(part for part in place if part) + (f": {how}." if how else ".")
    spec = table.first.spec
    here = [] if _of(paper, spec.model) else [table.first.model]
    if paper.records and paper.records != spec.size:
        here.append(f"{spec.size:,} record{'' if spec.size == 1 else 's'}")
    if here:
        text += f" Here: {', '.join(here)}."
    return f"{text} {paper.remark}".rstrip()
