"""One table of several models, data sets, moments and seeds, as papers print them.

Rows are methods, in blocks of one model; columns stand in groups of one data set and moment. What seeds differ in is
joined to a mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from kecore.evaluate.columns import described
from kecore.evaluate.protocol import AFTER
from kecore.evaluate.result import Score
from kecore_bench.report.costs import Cost
from kecore_bench.report.marks import Mark, mark_best
from kecore_bench.report.papers import PaperRow, cite, lines
from kecore_bench.report.seeds import join_scores
from kecore_bench.report.table import MOMENTS, Row, Table, count_records
from kecore_bench.report.text import FIRST, missing_notes

if TYPE_CHECKING:
    from kecore_bench.published import PaperTable

__all__ = ["Block", "Cell", "Column", "Group", "JoinedTable", "Line", "decimals", "join"]

_MOST = 6
"""Columns of scores in all, where nobody chose any: what a page of text holds."""
_MOST_DECIMALS = 3


@dataclass(frozen=True)
class Column:
    """A column of a group.

    Args:
        key: of the score or the cost.
        heading: stands above it.
        lower: lower values are better.
        decimals: with how many its values are written.
        cost: the cost, where it is one.
    """

    key: str
    heading: str
    lower: bool = False
    decimals: int = _MOST_DECIMALS
    cost: Cost | None = None

    def write(self, value: float) -> str:
        """Write a value of the column."""
        return f"{value:.{self.decimals}f}" if self.cost is None else self.cost.write(value)

    def write_size(self, value: float) -> str:
        """Write a deviation of the column, which has no sign."""
        return f"{value:.{self.decimals}f}"


@dataclass(frozen=True)
class Group:
    """Columns of one data set at one moment.

    Args:
        title: what tells the group from the others; empty where there is one.
        columns: its columns.
    """

    title: str
    columns: Sequence[Column]


@dataclass(frozen=True)
class Cell:
    """A value of the table.

    Args:
        score: the value, with its interval, or with mean minus and plus deviation where there are several seeds.
        seeds: how many seeds it is the mean of.
        mark: whether it is the best of its block and column.
    """

    score: Score
    seeds: int = 1
    mark: Mark = ""


@dataclass(frozen=True)
class Line:
    """A row of the table.

    Args:
        label: the method, or the row of a paper.
        cells: its values, in the order of all columns of all groups; None where there is none.
        is_paper: the figures are those of a paper.
    """

    label: str
    cells: Sequence[Cell | None]
    is_paper: bool = False


@dataclass(frozen=True)
class Block:
    """Rows of one model.

    Args:
        title: the model; empty where there is one.
        lines: its rows.
    """

    title: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class JoinedTable:
    """The table; make it with :func:`join`.

    Args:
        groups: its columns.
        blocks: its rows.
        seeds: the seeds behind it, in order.
        tables: the tables that it was made of.
        papers: tables of papers that it cites, in the order of their numbers.
    """

    groups: Sequence[Group]
    blocks: Sequence[Block]
    seeds: Sequence[int]
    tables: Sequence[Table]
    papers: Sequence[PaperTable]

    @property
    def columns(self) -> list[Column]:
        """The columns of all groups, in order."""
        columns: list[Column] = []
        for group in self.groups:
            columns += group.columns
        return columns

    @property
    def models(self) -> list[str]:
        """The models, each once."""
        return list(dict.fromkeys(table.first.model for table in self.tables))

    @property
    def sets(self) -> list[str]:
        """The data sets, each once."""
        return list(dict.fromkeys(_set_name(table) for table in self.tables))

    @property
    def subject(self) -> str:
        """What the table is of: models, and data sets with their numbers of records."""
        sets: dict[str, None] = {}
        for table in self.tables:
            sets[f"{count_records(table.first.spec.size)} of {_set_name(table)}"] = None
        return f"{', '.join(self.models)} on {', '.join(sets)}"

    @property
    def spread(self) -> str:
        """What stands beside a value, in words."""
        if len(self.seeds) == 1:
            return "means over records with the ends of their 95 % confidence intervals"
        return f"means and standard deviations over {len(self.seeds)} seeds ({', '.join(map(str, self.seeds))})"

    @property
    def notes(self) -> list[str]:
        """What a reader has to know of single rows and columns: sources of papers' rows, failures, missing values."""
        texts: list[str] = []
        for number, paper in enumerate(self.papers, 1):
            citing = [table for table in self.tables if paper in table.cited]
            texts.append(f"[{number}] {cite(paper, citing[0])}")
        titles_of: dict[str, list[str]] = {}  # of the tables that have a note
        for table in self.tables:
            for note in missing_notes(table):
                titles_of.setdefault(note, []).append(table.title)
        for note, titles in titles_of.items():
            texts.append(note if len(titles) == len(self.tables) else f"{note} ({'; '.join(titles)})")
        return texts


@dataclass(frozen=True)
class _Place:
    """Whose value of what: a key of the values while a table is made."""

    model: str
    group: str
    label: str
    key: str


def join(tables: Sequence[Table]) -> JoinedTable:
    """Return one table of all tables.

    Columns are those that were chosen, or else the most telling scores of each data set: six in all, as a page of text
    has no room for more, but at least two a data set.

    Args:
        tables: of protocols that differ by nothing but the seed.
    """
    models = _titles(tables, _model_names, lambda table: table.first.spec.group[0])
    group_titles = _titles(tables, _group_names, lambda table: (*table.first.spec.group[1:], table.moment))
    papers: list[PaperTable] = []
    for table in tables:
        papers += [paper for paper in table.cited if paper not in papers]
    values: dict[_Place, list[Score]] = {}
    rows: dict[str, dict[str, Row | PaperRow]] = {}  # by model and label, in the order of the lines
    for table, model, group in zip(tables, models, group_titles, strict=True):
        for row in lines(table):
            label = f"{row.method} [{papers.index(row.paper) + 1}]" if isinstance(row, PaperRow) else row.label
            rows.setdefault(model, {}).setdefault(label, row)
            for key, score in _values_of(table, row).items():
                values.setdefault(_Place(model, group, label, key), []).append(score)
    most = max(_MOST // len(set(group_titles)), 2)
    groups: list[Group] = []
    for title in dict.fromkeys(group_titles):
        group_tables = [table for table, group in zip(tables, group_titles, strict=True) if group == title]
        groups.append(Group(title, _columns(group_tables, title, values, most)))
    blocks = [_block(model, model_rows, groups, values) for model, model_rows in rows.items()]
    seeds = sorted({table.first.protocol.seed for table in tables})
    return JoinedTable(groups, blocks, seeds, tables, papers)


def _titles(
    tables: Sequence[Table],
    names: Callable[[Table], Sequence[str]],
    identity: Callable[[Table], Hashable],
) -> list[str]:
    """Return what tells each table from the others: those of some names that differ, the last one only if it has to.

    Args:
        tables: the tables.
        names: of a table, in the order of a title; the last is one that no two tables share by chance.
        identity: what the titles of two tables differ by.
    """
    names_of = [names(table) for table in tables]
    titles = _join_varying([of_table[:-1] for of_table in names_of])
    if len(set(titles)) < len(set(map(identity, tables))):
        titles = _join_varying(names_of)
    return titles


def _join_varying(names_of: Sequence[Sequence[str]]) -> list[str]:
    """Return each table's names, joined, as far as tables differ in them."""
    varying = [len(set(column)) > 1 for column in zip(*names_of, strict=True)]
    titles: list[str] = []
    for names in names_of:
        titles.append(", ".join(name for name, varies in zip(names, varying, strict=True) if varies and name))
    return titles


def _model_names(table: Table) -> list[str]:
    loading = table.first.spec.loading
    return [table.first.model, str(loading.get("dtype", "")), table.first.spec.model]


def _group_names(table: Table) -> list[str]:
    spec = table.first.spec
    moment = "" if table.moment == AFTER else MOMENTS[table.moment].partition(":")[0]
    parts = [str(spec.data.get(name, "")) for name in ("split", "variant")]
    return [_set_name(table), *parts, count_records(spec.size), moment, spec.data["sha256"][:8]]


def _set_name(table: Table) -> str:
    """Return the name of a table's data set, without what a file's name ends in."""
    return re.sub(r"\.(jsonl?|csv|tsv|parquet|arrow)(\.\w+)?$", "", table.first.spec.data["name"])


def _values_of(table: Table, row: Row | PaperRow) -> dict[str, Score]:
    """Return scores and costs of a row by key; figures of papers and costs have no interval."""
    if isinstance(row, PaperRow):
        return {key: Score(value, None, 0, 0) for key, value in row.scores.items()}
    values = dict(row.scores)
    for cost in table.costs:
        value = cost.value(row.result)
        if value is not None:
            values[cost.key] = Score(value, None, 0, 0)
    return values


def _columns(tables: Sequence[Table], group: str, values: Mapping[_Place, list[Score]], most: int) -> list[Column]:
    """Return the columns of a group: of those that were chosen, or of the most telling ones, those with a value."""
    first = tables[0]
    keys: list[str] = []
    for table in tables:
        keys += table.columns
    with_values = {place.key for place in values if place.group == group}
    keys = [key for key in dict.fromkeys(keys) if key in with_values]
    if first.keys is None:
        telling = sorted(keys, key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST))[:most]
        keys = [key for key in keys if key in telling]
    columns: list[Column] = []
    for key in keys:
        scores = [join_scores(list_of) for place, list_of in values.items() if (place.group, place.key) == (group, key)]
        is_lower = key.partition(".")[0] in first.described and described(first.described, key).lower
        columns.append(Column(key, first.heading(key), is_lower, decimals(scores)))
    if first.keys is not None:
        columns += [
            Column(cost.key, cost.heading, lower=True, decimals=cost.decimals, cost=cost) for cost in first.costs
        ]
    return columns


def decimals(scores: Sequence[Score]) -> int:
    """Return with how many decimals a column is written: to the first digit that the interval leaves open.

    The half-width of the median interval decides: its first digit is the last one that is written, or the second where
    the first is 1. Three where there are no intervals, never more.

    Examples:
        >>> decimals([Score(0.95, (0.9, 1.0), 20, 20)]), decimals([Score(47.49, (44.9, 50.1), 40, 40)])
        (2, 0)
    """
    half_widths = [(score.ends[1] - score.ends[0]) / 2 for score in scores if score.ends]
    half_widths = [width for width in half_widths if width > 0]
    if not half_widths:
        return _MOST_DECIMALS
    width = median(half_widths)
    exponent = math.floor(math.log10(width) + 1e-9)
    if width < 2 * 10**exponent:
        exponent -= 1
    return min(max(-exponent, 0), _MOST_DECIMALS)


def _block(
    model: str, rows: Mapping[str, Row | PaperRow], groups: Sequence[Group], values: Mapping[_Place, list[Score]]
) -> Block:
    """Return the rows of a model, the best of each column marked."""
    cells: dict[str, list[Cell | None]] = {label: [] for label in rows}
    for group in groups:
        for column in group.columns:
            scores: dict[str, list[Score]] = {}
            for label in rows:
                scores[label] = values.get(_Place(model, group.title, label, column.key), [])
            marks = _marks_of(column, rows, scores)
            for label, of_seeds in scores.items():
                cell = Cell(join_scores(of_seeds), len(of_seeds), marks.get(label, "")) if of_seeds else None
                cells[label].append(cell)
    block_lines = [Line(label, cells[label], isinstance(row, PaperRow)) for label, row in rows.items()]
    return Block(model, block_lines)


def _marks_of(column: Column, rows: Mapping[str, Row | PaperRow], scores: Mapping[str, list[Score]]) -> dict[str, Mark]:
    """Return the marks of edited models; neither the unedited one nor a paper competes."""
    competing: dict[str, Score] = {}
    for label, row in rows.items():
        if isinstance(row, Row) and row.result.edits and scores[label]:
            competing[label] = join_scores(scores[label])
    if column.cost is not None and not column.cost.ranked:
        return {}
    return mark_best(competing, lower=column.lower, decimals=column.decimals)
