"""What the plots show, as numbers: :mod:`kecore_bench.report.plots` draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kecore.evaluate.result import Score
from kecore_bench.report.papers import PaperRow, lines
from kecore_bench.report.results import Result, Table

__all__ = ["Curve", "Line", "Scatter", "Stages", "colour", "curves", "scatters", "stage_colour", "stages"]

COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#5b4b9a", "#a33b20", "#3d7a2a", "#7f3c5d"
)  # fmt: skip
"""Told apart by colour-blind readers too, as far as so many can (after Okabe and Ito); grey is the unedited model."""

STAGE_COLOURS = ("#7aa6c2", "#e0b070", "#8fb996", "#c9a0bd", "#b5a878", "#a9d3e6", "#a69fcc", "#cf9f92")
"""Paler than those of the methods, which they do not stand for."""

_GREY = "#777777"

_LOCALITY = {
    "neighbourhood_success": "neighbourhood success (NS)",
    "locality": "locality (stability)",
    "neighbourhood_stability": "neighbourhood stability",
}
_SUCCESS = (
    {"edit_success": "edit success (ES)", "strict_accuracy": "strict accuracy, edit"},
    {"paraphrase_success": "paraphrase success (PS)", "paraphrase_strict_accuracy": "strict accuracy, paraphrase"},
)


def colour(table: Table, label: str) -> str:
    """The colour of a method, the same in all plots of a table."""
    edited = [row.label for row in table.rows if row.result.edits]
    return COLOURS[edited.index(label) % len(COLOURS)] if label in edited else _GREY


@dataclass(frozen=True)
class Scatter:
    """Success against locality, a point a method.

    Args:
        x: name of the horizontal axis.
        y: name of the vertical axis.
        points: label and both scores.
        published: of papers' rows the label, that of the run below which it stands (or nothing), and both figures.
    """

    x: str
    y: str
    points: Sequence[tuple[str, Score, Score]]
    published: Sequence[tuple[str, str, float, float]] = ()


@dataclass(frozen=True)
class Line:
    """One method's curve.

    Args:
        label: the method.
        points: number of facts edited so far, and the score of all of them.
    """

    label: str
    points: Sequence[tuple[int, Score]]


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
        counts = sorted({count for line in self.lines for count, _ in line.points})
        return counts[:: -max(1, -(-len(counts) // 6))][::-1]


@dataclass(frozen=True)
class Stages:
    """Seconds of editing for each fact by stage.

    Args:
        names: the stages.
        rows: label, seconds by stage, seconds in all; what no stage counts is ``other``.
    """

    names: Sequence[str]
    rows: Sequence[tuple[str, dict[str, float], float]]


def scatters(table: Table) -> list[Scatter]:
    """The panels that the table's scores allow."""
    x = next((key for key in _LOCALITY if key in table.columns), None)
    found: list[Scatter] = []
    for choices in _SUCCESS:
        y = next((key for key in choices if key in table.columns), None)
        if x is not None and y is not None:
            points = [(r.label, r.scores[x], r.scores[y]) for r in table.rows if x in r.scores and y in r.scores]
            found.append(Scatter(_LOCALITY[x], choices[y], points, _published(table, x, y)))
    return found


def _published(table: Table, x: str, y: str) -> list[tuple[str, str, float, float]]:
    papers = [row for row in lines(table) if isinstance(row, PaperRow) and x in row.scores and y in row.scores]
    return [(row.label, row.beside, row.scores[x], row.scores[y]) for row in papers]


def curves(results: Sequence[Result]) -> list[Curve]:
    """The curves of runs on the same records; none where no sequence was scored on its way."""
    found: list[Curve] = []
    named = {**_SUCCESS[0], **_SUCCESS[1], **_LOCALITY}
    for key in ("edit_success", "strict_accuracy", "paraphrase_success", "neighbourhood_success", "locality"):
        lines = [Line(result.label, result.retention(key)) for result in results]
        lines = [line for line in lines if len(line.points) > 1]
        if lines:
            found.append(Curve(named[key], lines))
    return found


def stage_colour(names: Sequence[str], name: str) -> str:
    """The colour of a stage."""
    return "#cccccc" if name == "other" else STAGE_COLOURS[names.index(name) % len(STAGE_COLOURS)]


def stages(table: Table) -> Stages:
    """Where the time of editing went."""
    rows: list[tuple[str, dict[str, float], float]] = []
    for row in table.rows:
        total, facts = row.result.seconds, sum(cost["records"] for cost in row.result.costs.values())
        if total is None:
            continue
        parts = {name: value / facts for name, value in row.result.stages.items()}
        parts["other"] = max(total - sum(parts.values()), 0.0)
        rows.append((row.label, parts, total))
    seconds: dict[str, float] = {}
    for _, parts, _ in rows:
        for name, value in parts.items():
            seconds[name] = seconds.get(name, 0.0) + value
    names = sorted((name for name in seconds if name != "other"), key=lambda name: -seconds[name])
    return Stages([*names, "other"], rows)
