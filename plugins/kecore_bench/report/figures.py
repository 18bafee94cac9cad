"""The numbers that plots show: :mod:`kecore_bench.report.plots` draws them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from kecore.evaluate.result import Score
from kecore_bench.report.papers import PaperRow, lines
from kecore_bench.report.results import Result, Retained
from kecore_bench.report.seeds import join_scores
from kecore_bench.report.table import Table

__all__ = [
    "Curve",
    "Line",
    "PaperPoint",
    "Point",
    "Scatter",
    "StageTimes",
    "Stages",
    "Style",
    "colour",
    "curves",
    "scatters",
    "stage_colour",
    "stages",
    "styles",
]

COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#5b4b9a", "#a33b20", "#3d7a2a", "#7f3c5d"
)  # fmt: skip
"""Told apart by colour-blind readers too, as far as so many can (after Okabe and Ito); grey is the unedited model."""

STAGE_COLOURS = ("#7aa6c2", "#e0b070", "#8fb996", "#c9a0bd", "#b5a878", "#a9d3e6", "#a69fcc", "#cf9f92")
"""Paler than those of the methods, which they do not stand for."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
"""Shapes of the marks, which tell methods apart without colours; their number has no factor in common with that of the
colours, so that 90 methods have a pair of their own."""

UNEDITED_MARKER = "*"

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


@dataclass(frozen=True)
class Style:
    """Look of a method, the same in all plots of a table.

    Args:
        colour: as ``#rrggbb``.
        marker: shape of its marks, as matplotlib names it.
    """

    colour: str = _GREY
    marker: str = UNEDITED_MARKER


def styles(*tables: Table) -> dict[str, Style]:
    """Return the looks of the methods of a table, or of tables of several seeds, by label."""
    looks: dict[str, Style] = {}
    number = 0
    for row in chain.from_iterable(table.rows for table in tables):
        if row.label in looks:
            continue
        looks[row.label] = Style()
        if row.result.edits:
            looks[row.label] = Style(COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)])
            number += 1
    return looks


def colour(table: Table, label: str) -> str:
    """Return the colour of a method, the same in all plots of a table."""
    return styles(table).get(label, Style()).colour


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


def scatters(*tables: Table) -> list[Scatter]:
    """Return the panels that the scores of a table allow; of tables of several seeds with the means over these."""
    table = tables[0]
    x_key = _first_column(table, _LOCALITY)
    panels: list[Scatter] = []
    for names in _SUCCESS:
        y_key = _first_column(table, names)
        if x_key is not None and y_key is not None:
            panels.append(_scatter(tables, x_key, y_key, (_LOCALITY[x_key], names[y_key])))
    return panels


def _first_column(table: Table, keys: Iterable[str]) -> str | None:
    """Return the first of some scores that heads a column; None where none does."""
    for key in keys:
        if key in table.columns:
            return key
    return None


def _scatter(tables: Sequence[Table], x_key: str, y_key: str, axes: tuple[str, str]) -> Scatter:
    """Return the points of all rows, papers' ones among them, that have both scores."""
    scores_of: dict[str, list[tuple[Score, Score]]] = defaultdict(list)  # by label, one a seed
    published: dict[str, PaperPoint] = {}
    for row in chain.from_iterable(map(lines, tables)):
        if x_key not in row.scores or y_key not in row.scores:
            continue
        if isinstance(row, PaperRow):
            published[row.label] = PaperPoint(row.label, row.beside, row.scores[x_key], row.scores[y_key])
        else:
            scores_of[row.label].append((row.scores[x_key], row.scores[y_key]))
    points: list[Point] = []
    for label, pairs in scores_of.items():
        points.append(Point(label, join_scores([x for x, _ in pairs]), join_scores([y for _, y in pairs])))
    x, y = axes
    return Scatter(x, y, points, list(published.values()))


def curves(results: Sequence[Result]) -> list[Curve]:
    """Return the curves of runs on the same records; none where no sequence was scored on its way.

    Runs of one label are those of several seeds, of which the curve is the mean.
    """
    panels: list[Curve] = []
    names = {**_SUCCESS[0], **_SUCCESS[1], **_LOCALITY}
    for key in _RETAINED:
        curve_lines: list[Line] = []
        for label in dict.fromkeys(result.label for result in results):
            points = _retained(key, [result for result in results if result.label == label])
            if len(points) > 1:
                curve_lines.append(Line(label, points))
        if curve_lines:
            panels.append(Curve(names[key], curve_lines))
    return panels


def _retained(key: str, runs: Sequence[Result]) -> list[Retained]:
    """Return a score at several numbers of facts, the mean over runs of several seeds."""
    scores_at: dict[int, list[Score]] = defaultdict(list)
    for run in runs:
        for point in run.retention(key):
            scores_at[point.facts].append(point.score)
    return [Retained(facts, join_scores(scores)) for facts, scores in sorted(scores_at.items())]


def stage_colour(names: Sequence[str], name: str) -> str:
    """Return the colour of a stage."""
    if name == "other":
        return _PALE_GREY
    return STAGE_COLOURS[names.index(name) % len(STAGE_COLOURS)]


def stages(*tables: Table) -> Stages:
    """Return where the time of editing went; of tables of several seeds on average."""
    seconds_of: dict[str, list[dict[str, float]]] = defaultdict(list)  # by label, one a seed
    for row in chain.from_iterable(table.rows for table in tables):
        if row.result.seconds is not None:
            seconds_of[row.label].append(_stage_seconds(row.result, row.result.seconds))
    rows: list[StageTimes] = []
    sums: dict[str, float] = defaultdict(float)  # by stage, of all methods
    for label, runs in seconds_of.items():
        seconds: dict[str, float] = defaultdict(float)
        for name, value in chain.from_iterable(run.items() for run in runs):
            seconds[name] += value / len(runs)
        for name, value in seconds.items():
            if name != "other":
                sums[name] += value
        rows.append(StageTimes(label, dict(seconds), sum(seconds.values())))
    names = sorted(sums, key=lambda name: -sums[name])
    return Stages([*names, "other"], rows)


def _stage_seconds(result: Result, total: float) -> dict[str, float]:
    """Return a run's seconds of editing for each fact by stage; what no stage counts is ``other``."""
    facts = sum(cost["records"] for cost in result.costs.values())
    seconds = {name: value / facts for name, value in result.stages.items()}
    seconds["other"] = max(total - sum(seconds.values()), 0.0)
    return seconds
