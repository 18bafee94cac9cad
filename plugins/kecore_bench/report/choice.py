"""Rows and columns that somebody chose of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from kecore.api.errors import ConfigError
from kecore.evaluate.columns import columns_of, described, in_order
from kecore_bench.published import PaperTable
from kecore_bench.report.costs import COSTS, Cost
from kecore_bench.report.results import Result
from kecore_bench.report.table import Table

__all__ = ["EVERYTHING", "Choice"]


@dataclass(frozen=True)
class Choice:
    """What a report is to show.

    Args:
        columns: scores, as their keys or headings (``edit_success`` or ``ES``; of an axis ``portability.reasoning``),
            and costs likewise (``s/fact``), in the order of the table; by default those that a format shows.
        rows: labels of runs, or methods, in the order of the table; by default all.
    """

    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.columns or self.rows)

    def of_runs(self, runs: Sequence[Result]) -> list[Result]:
        """Return the chosen runs, in the chosen order.

        Raises:
            ConfigError: names a row that no run has, and the nearest.
        """
        if not self.rows:
            return list(runs)
        chosen: list[Result] = []
        for name in self.rows:
            by_label = [run for run in runs if _plain(name) in (_plain(run.label), _plain(run.spec.label))]
            matching = by_label or [run for run in runs if _plain(run.spec.method or "") == _plain(name)]
            if not matching:
                labels = dict.fromkeys(run.label for run in runs)
                raise ConfigError(_unknown("--rows", name, labels, "the rows are"))
            chosen += [run for run in matching if run not in chosen]
        names = {_plain(name) for name in self.rows} | {_plain(run.label) for run in chosen}
        return [replace(run, published=_papers_of(run.published, names)) for run in chosen]

    def of_tables(self, tables: Sequence[Table]) -> list[Table]:
        """Return the tables with the chosen columns.

        Raises:
            ConfigError: names a column that no metric and no cost has, or that no run has a value of.
        """
        if not self.columns:
            return list(tables)
        scores = _scores_by_name(tables)
        costs = {_plain(name): cost for cost in COSTS for name in (cost.key, cost.heading)}
        keys: list[str] = []
        chosen_costs: list[Cost] = []
        for name in self.columns:
            if _plain(name) in scores:
                keys.append(scores[_plain(name)])
            elif _plain(name) in costs:
                chosen_costs.append(costs[_plain(name)])
            else:
                raise ConfigError(_explain(name, tables))
        unique = tuple(dict.fromkeys(keys))
        return [replace(table, keys=unique, costs=tuple(dict.fromkeys(chosen_costs))) for table in tables]


EVERYTHING = Choice()
"""No choice: what a format shows by itself."""


def _plain(name: str) -> str:
    """Return a name as names are compared: without regard to case, spaces, hyphens and underscores."""
    return name.casefold().replace(" ", "").replace("_", "").replace("-", "").replace(",", "")


def _papers_of(papers: Iterable[PaperTable], names: set[str]) -> list[PaperTable]:
    """Return the tables of papers with the rows of chosen methods alone."""
    chosen: list[PaperTable] = []
    for paper in papers:
        rows = {method: figures for method, figures in paper.rows.items() if _plain(method) in names}
        if rows:
            chosen.append(paper.model_copy(update={"rows": rows}))
    return chosen


def _scores_by_name(tables: Sequence[Table]) -> dict[str, str]:
    """Return the keys of all scores that some run has, by each of their names."""
    keys: dict[str, str] = {}
    for table in tables:
        for key in [*in_order(table.described, table.scored_keys), *table.columns]:
            for name in (key, table.heading(key)):
                keys.setdefault(_plain(name), key)
    return keys


def _explain(name: str, tables: Sequence[Table]) -> str:
    """Say why a column cannot be shown."""
    measured = {key: table.heading(key) for table in tables for key in table.columns}
    names = [*measured.values(), *(cost.heading for cost in COSTS)]
    columns = columns_of(tables[0].first.protocol)
    for key in columns:
        if _plain(name) in (_plain(key), _plain(described(columns, key).heading)):
            return f"--columns {name}: no run has a value of it; those of the main table are {', '.join(names)}"
    others = {key for table in tables for key in table.scored_keys}
    return _unknown("--columns", name, [*names, *sorted(others)], "columns are", shown=names)


def _unknown(option: str, name: str, known: Iterable[str], are: str, shown: Sequence[str] = ()) -> str:
    """Say that there is no such row or column, and what the nearest is."""
    by_plain: Mapping[str, str] = {_plain(text): text for text in known}
    near = get_close_matches(_plain(name), list(by_plain), n=1, cutoff=0.5)
    hint = f"did you mean '{by_plain[near[0]]}'? " if near else ""
    return f"{option} {name}: there is no such one; {hint}{are} {', '.join(shown or by_plain.values())}"
