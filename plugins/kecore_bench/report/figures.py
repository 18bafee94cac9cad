"""The numbers that plots show: :mod:`kecore_bench.report.plots` draws them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kecore.evaluate.result import Score
from kecore_bench.report.papers import PaperRow, lines
from kecore_bench.report.results import Result, Retained
from kecore_bench.report.table import Table

__all__ = [
    "Curve",
    "Line",
    "PaperPoint",
    "Point",
    "Scatter",
    "StageTimes",
    "Stages",
    "colour",
    "curves",
    "scatters",
    "stage_colour",
    "stages",
]

COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#5b4b9a", "#a33b20", "#3d7a2a", "#7f3c5d"
)  # fmt: skip
"""Told apart by colour-blind readers too, as far as so many can (after Okabe and Ito); grey is the unedited model."""

STAGE_COLOURS = ("#7aa6c2", "#e0b070", "#8fb996", "#c9a0bd", "#b5a878", "#a9d3e6", "#a69fcc", "#cf9f92")
"""Paler than those of the methods, which they do not stand for."""

_GREY, _PALE_GREY = "#777777", "#cccccc"

_MOST_TICKS = 6

_LOCALITY = {
    "neighbourhood_success": "neighbourhood success (NS)",
    "locality": "locality (stability)",
    "neighbourhood_stability": "neighbourhood stability",
}
_SUCCESS = (
    {"edit_success": "edit success (ES)", "strict_accuracy": "strict accuracy, edit"},
    {"paraphrase_success": "paraphrase success (PS)", "paraphrase_strict_accuracy": "strict accuracy, paraphrase"},
)

_RETAINED = ("edit_success", "strict_accuracy", "paraphrase_success", "neighbourhood_success", "locality")
"""Scores that have a curve."""


def colour(table: Table, label: str) -> str:
    """Return the colour of a method, the same in all plots of a table."""
    methods = [row.label for row in table.rows if row.result.edits]
    if label not in methods:
        return _GREY
    return COLOURS[methods.index(label) % len(COLOURS)]


@dataclass(frozen=True)
class Point:
    """A method's place among the others.

    Args:
        label: the method.
        x: its score on the horizontal axis.
        y: that on the vertical axis.
    """

    label: str
    x: Score
    y: Score


@dataclass(frozen=True)
class PaperPoint:
    """A paper's figures of a method.

    Args:
        label: the paper's row.
        beside: label of the run below which it stands; empty where there is none.
        x: the figure on the horizontal axis.
        y: that on the vertical axis.
    """

    label: str
    beside: str
    x: float
    y: float


@dataclass(frozen=True)
class Scatter:
    """Success against locality, a point a method.

    Args:
        x: name of the horizontal axis.
        y: name of the vertical axis.
        points: one a method.
        published: one a row of a paper.
    """

    x: str
    y: str
    points: Sequence[Point]
    published: Sequence[PaperPoint] = ()


@dataclass(frozen=True)
class Line:
    """One method's curve.

    Args:
        label: the method.
        points: the score of all facts edited so far, at several numbers of them.
    """

    label: str
    points: Sequence[Retained]


@dataclass(frozen=True)
class Curve:
    """A score of all facts edited so far, over their number.

    Args:
        y: name of the vertical axis.
        lines: one a method.
    """

    y: str
    lines: Sequence[Line]

    @property
    def ticks(self) -> list[int]:
        """Numbers of facts to mark: those that were scored, the last one among them, at most six."""
        counts: set[int] = set()
        for line in self.lines:
            counts |= {point.facts for point in line.points}
        descending = sorted(counts, reverse=True)
        step = math.ceil(len(descending) / _MOST_TICKS)
        return sorted(descending[::step])


@dataclass(frozen=True)
class StageTimes:
    """Seconds of a method's editing for each fact.

    Args:
        label: the method.
        seconds: by stage; what no stage counts is ``other``.
        total: seconds in all.
    """

    label: str
    seconds: Mapping[str, float]
    total: float


@dataclass(frozen=True)
class Stages:
    """Seconds of editing for each fact by stage.

    Args:
        names: the stages, the longest first, and ``other``.
        rows: one a method.
    """

    names: Sequence[str]
    rows: Sequence[StageTimes]


def scatters(table: Table) -> list[Scatter]:
    """Return the panels that the table's scores allow."""
    x_key = _first_column(table, _LOCALITY)
    panels: list[Scatter] = []
    for names in _SUCCESS:
        y_key = _first_column(table, names)
        if x_key is not None and y_key is not None:
            panels.append(_scatter(table, x_key, y_key, (_LOCALITY[x_key], names[y_key])))
    return panels


def _first_column(table: Table, keys: Iterable[str]) -> str | None:
    """Return the first of some scores that heads a column; None where none does."""
    for key in keys:
        if key in table.columns:
            return key
    return None


def _scatter(table: Table, x_key: str, y_key: str, axes: tuple[str, str]) -> Scatter:
    """Return the points of all rows, papers' ones among them, that have both scores."""
    points: list[Point] = []
    published: list[PaperPoint] = []
    for row in lines(table):
        if x_key not in row.scores or y_key not in row.scores:
            continue
        if isinstance(row, PaperRow):
            published.append(PaperPoint(row.label, row.beside, row.scores[x_key], row.scores[y_key]))
        else:
            points.append(Point(row.label, row.scores[x_key], row.scores[y_key]))
    x, y = axes
    return Scatter(x, y, points, published)


def curves(results: Sequence[Result]) -> list[Curve]:
    """Return the curves of runs on the same records; none where no sequence was scored on its way."""
    panels: list[Curve] = []
    names = {**_SUCCESS[0], **_SUCCESS[1], **_LOCALITY}
    for key in _RETAINED:
        curve_lines = [Line(result.label, result.retention(key)) for result in results]
        curve_lines = [line for line in curve_lines if len(line.points) > 1]
        if curve_lines:
            panels.append(Curve(names[key], curve_lines))
    return panels


def stage_colour(names: Sequence[str], name: str) -> str:
    """Return the colour of a stage."""
    if name == "other":
        return _PALE_GREY
    return STAGE_COLOURS[names.index(name) % len(STAGE_COLOURS)]


def stages(table: Table) -> Stages:
    """Return where the time of editing went."""
    rows: list[StageTimes] = []
    sums: dict[str, float] = defaultdict(float)  # by stage, of all methods
    for row in table.rows:
        total = row.result.seconds
        if total is None:
            continue
        facts = sum(cost["records"] for cost in row.result.costs.values())
        seconds = {name: value / facts for name, value in row.result.stages.items()}
        for name, value in seconds.items():
            sums[name] += value
        seconds["other"] = max(total - sum(seconds.values()), 0.0)
        rows.append(StageTimes(row.label, seconds, total))
    names = sorted(sums, key=lambda name: -sums[name])
    return Stages([*names, "other"], rows)
