"""The plots of a report, drawn by matplotlib: as SVG inside the page, and as PNG, PDF and SVG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from kecore.evaluate.result import Score
from kecore_bench.report.figures import (
    Curve,
    Scatter,
    Stages,
    Style,
    curves,
    scatters,
    stage_colour,
    stages,
    styles,
)
from kecore_bench.report.growth import growth_lines
from kecore_bench.report.growth_plot import draw_growth
from kecore_bench.report.plot import MARK, Plot, look_of, make_panels, name_beside, need_matplotlib
from kecore_bench.report.results import Result
from kecore_bench.report.seeds import join_tables
from kecore_bench.report.spread import spread_out
from kecore_bench.report.table import Table, last_moments
from kecore_bench.report.text import shown

__all__ = ["drawn_plots", "write_plots"]

_APART = 1.6 * MARK
"""Least distance of two marks, in points: the widest of them, a square on its corner, is 1.41 times its size wide."""
_DODGE = 6.0
"""Most points by which the marks of two curves over one number of facts stand apart."""
_CURVE_POINTS = 270.0
"""Width of a panel of curves between its axes, in points."""
_BAR_INCHES = 0.28
"""Height of a method's bar."""


def drawn_plots(tables: Sequence[Table], results: Sequence[Result], last: bool) -> list[Plot]:
    """Draw the plots of a table, those that its scores and costs allow.

    Args:
        tables: the table; or several that differ by nothing but the seed, of which means are drawn.
        results: the runs behind all tables.
        last: the table is of the last moment, which retention and costs are shown with.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    need_matplotlib()
    plots: list[Plot] = []
    looks = styles(*tables)
    bars = "Bars: 95 % confidence intervals."
    if len(tables) > 1:
        bars = f"Means over {len(tables)} seeds; bars: standard deviation over seeds."
    scatter_panels = scatters(*tables)
    if scatter_panels:
        plots.append(_draw_scatters(scatter_panels, looks, bars))
    if not last:
        return plots
    protocols = {table.first.protocol.hash() for table in tables}
    group = tables[0].first.spec.group
    runs = [result for result in results if result.spec.group == group and result.protocol.hash() in protocols]
    curve_panels = curves(runs)
    if curve_panels:
        plots.append(_draw_curves(curve_panels, looks, bars))
    grown = growth_lines(runs)
    if grown:
        plots.append(draw_growth(grown, looks))
    spent = stages(*tables)
    if spent.rows:
        plots.append(_draw_stages(spent))
    return plots


def write_plots(
    tables: Sequence[Table], results: Sequence[Result], out: Path, formats: Sequence[str] = ("png",)
) -> dict[str, list[Path]]:
    """Write the plots of all tables as files, one a table, moment and kind; seeds are joined.

    Args:
        tables: the tables.
        results: the runs behind them.
        out: directory for the files.
        formats: ``png``, ``pdf``, ``svg``. A PNG has a title; the others are for papers, which have captions.

    Returns:
        The files by format: ``scatter-1.png``, ``stages-1.png`` and, of sequences, ``retention-1.png``, and so on.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        StorageError: a file cannot be written.
    """
    last = last_moments(tables)
    written: dict[str, list[Path]] = {format: [] for format in formats}
    need_matplotlib()
    for number, seed_tables in enumerate(join_tables(tables), 1):
        table = seed_tables[0]
        for plot in drawn_plots(seed_tables, results, table in last):
            for format in sorted(formats, key=lambda format: format == "png"):  # last, as the title stays
                if format == "png":
                    title = replace(table, seed=None).title
                    if plot.name != "scatter":
                        title = title.partition(", at-")[0]  # the moment, of which the plot has several
                    plot.figure.suptitle(title, fontsize=9, x=0.01, ha="left")
                written[format].append(plot.write(out / f"{plot.name}-{number}.{format}", format))
    return written


@dataclass(frozen=True)
class _Mark:
    """A mark of a scatter plot.

    Args:
        x: its place on the horizontal axis.
        y: that on the vertical axis.
        tip: what it says where the pointer is held over it.
        look: how matplotlib draws it.
    """

    x: float
    y: float
    tip: str
    look: Mapping[str, Any]


def _draw_scatters(panels: Sequence[Scatter], looks: Mapping[str, Style], bars: str) -> Plot:
    """Draw both scores from 0 to 1 with their intervals, a mark a method; rings are figures of papers."""
    figure, axes = make_panels(len(panels), 4.6)
    caption = f"{bars} Top right is best."
    if any(panel.published for panel in panels):
        caption += " Rings: figures of papers."
    plot = Plot("scatter", "Success against locality", figure, caption)
    for axis, panel in zip(axes, panels, strict=True):
        axis.set(xlabel=panel.x, ylabel=panel.y, xlim=(-0.06, 1.08), ylim=(-0.06, 1.08))
        axis.grid(alpha=0.3)
        for point in panel.points:
            whiskers = {"xerr": _whiskers([point.x]), "yerr": _whiskers([point.y])}
            axis.errorbar(
                point.x.value, point.y.value, **whiskers, fmt="none", ecolor=looks[point.label].colour, elinewidth=1
            )
    _name_marks(figure, panels, looks)
    figure.draw_without_rendering()  # only then is known how far from each other the marks will be
    is_moved = False
    for axis, panel in zip(axes, panels, strict=True):
        is_moved = _draw_marks(plot, axis, _marks(panel, looks)) or is_moved
    if is_moved:
        plot.caption += " A mark whose place is taken stands beside it; a line leads there."
    return plot


def _marks(panel: Scatter, looks: Mapping[str, Style]) -> list[_Mark]:
    """Return the marks of a panel: of methods first, then the rings of papers."""
    marks: list[_Mark] = []
    for point in panel.points:
        tip = f"{point.label}: {panel.x} {shown(point.x)}, {panel.y} {shown(point.y)}"
        marks.append(_Mark(point.x.value, point.y.value, tip, look_of(looks[point.label])))
    for ring in panel.published:
        tip = f"{ring.label}: {panel.x} {ring.x:.3f}, {panel.y} {ring.y:.3f}"
        marks.append(_Mark(ring.x, ring.y, tip, _ring(looks.get(ring.beside, Style()))))
    return marks


def _ring(style: Style) -> dict[str, Any]:
    """Return how a figure of a paper is drawn."""
    return {"marker": "o", "color": style.colour, "ms": MARK, "mfc": "none", "ls": "none"}


def _draw_marks(plot: Plot, axis: Any, marks: Sequence[_Mark]) -> bool:
    """Draw marks so that none hides another; return whether some stand beside their places.

    Distances are measured in points, after the figure was laid out. The whiskers stay at the place itself.
    """
    from matplotlib.transforms import ScaledTranslation

    pixels_per_point = plot.figure.dpi / 72
    places: list[tuple[float, float]] = []
    for mark in marks:
        x, y = axis.transData.transform((mark.x, mark.y)) / pixels_per_point
        places.append((float(x), float(y)))
    is_moved = False
    for mark, place, spot in zip(marks, places, spread_out(places, _APART), strict=True):
        offset = (spot[0] - place[0], spot[1] - place[1])
        if any(offset):
            is_moved = True
            line = {"arrowstyle": "-", "lw": 0.8, "color": "#333333", "shrinkA": 0, "shrinkB": 0}
            axis.annotate("", (mark.x, mark.y), offset, textcoords="offset points", arrowprops=line, zorder=2.4)
        move = ScaledTranslation(offset[0] / 72, offset[1] / 72, plot.figure.dpi_scale_trans)
        (dot,) = axis.plot(
            mark.x, mark.y, **mark.look, transform=axis.transData + move, clip_on=False, zorder=3, scalex=False,
            scaley=False,
        )  # fmt: skip
        plot.tell(dot, mark.tip)
    return is_moved


def _name_marks(figure: Any, panels: Sequence[Scatter], looks: Mapping[str, Style]) -> None:
    """Name the marks beside the panels: inside one the names would lie where the best points are."""
    from matplotlib.lines import Line2D

    labels = dict.fromkeys(point.label for panel in panels for point in panel.points)
    handles = [Line2D([], [], **look_of(looks[label]), label=label) for label in labels]
    if any(panel.published for panel in panels):
        handles.append(Line2D([], [], **_ring(Style()), label="rings: papers"))
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)


def _draw_curves(panels: Sequence[Curve], looks: Mapping[str, Style], bars: str) -> Plot:
    """Draw a score of all facts edited so far over their number, a line a method."""
    figure, axes = make_panels(len(panels), 4.6)
    caption = f"{bars} Methods stand beside each other over one number of facts."
    plot = Plot("retention", "Retention: all facts edited so far, scored again on the way", figure, caption)
    for axis, panel in zip(axes, panels, strict=True):
        first, *_, end = panel.ticks
        gaps = [right - left for left, right in pairwise(panel.ticks)]
        span = 1.2 * (end - first)  # with room at both sides
        dodge = min(_DODGE, 0.8 * _CURVE_POINTS * min(gaps) / span / len(panel.lines))  # in points
        for number, line in enumerate(panel.lines):
            # Marks and bars of several methods would cover each other.
            shift = dodge * span / _CURVE_POINTS * (number - (len(panel.lines) - 1) / 2)
            counts = [point.facts + shift for point in line.points]
            scores = [point.score for point in line.points]
            values = [score.value for score in scores]
            look = {**look_of(looks[line.label]), "ms": dodge * MARK / _APART, "ls": "-"}
            axis.errorbar(counts, values, _whiskers(scores), **look, elinewidth=1, lw=1, label=line.label)
            for count, point in zip(counts, line.points, strict=True):
                (dot,) = axis.plot(count, point.score.value, **look)
                plot.tell(dot, f"{line.label}: {shown(point.score)} of {point.facts} facts")
        axis.set(xlabel="facts edited so far", ylabel=panel.y, ylim=(-0.05, 1.05), xticks=panel.ticks)
        axis.set_xlim(first - span / 12, end + span / 12)
        axis.grid(alpha=0.3)
    name_beside(figure, axes[0])
    return plot


def _draw_stages(spent: Stages) -> Plot:
    """Draw the seconds for each fact, a bar a method, a colour a stage."""
    figure = need_matplotlib()(figsize=(9.5, 1.2 + _BAR_INCHES * len(spent.rows)), layout="constrained")
    axis = figure.add_subplot()
    plot = Plot("stages", "Seconds of editing for each fact, by stage", figure)
    labels = [row.label for row in spent.rows]
    starts = [0.0] * len(labels)  # where the next stage's section of each bar begins
    for name in spent.names:
        widths = [row.seconds.get(name, 0.0) for row in spent.rows]
        bars = axis.barh(labels, widths, left=starts, label=name, color=stage_colour(spent.names, name))
        for bar, label, width in zip(bars, labels, widths, strict=True):
            plot.tell(bar, f"{label}, {name}: {width:.3f} s for each fact")
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for index, row in enumerate(spent.rows):
        text, end = f"{row.total:.2f} s", (starts[index], index)
        axis.annotate(text, end, (4, 0), textcoords="offset points", va="center", size=8)
    axis.invert_yaxis()
    axis.margins(x=0.08)
    axis.set(xlabel="seconds of editing for each fact")
    name_beside(figure, axis)
    return plot


def _whiskers(scores: Sequence[Score]) -> list[list[float]]:
    """Return the lengths of the intervals below and above each score; 0 where there is none."""
    below: list[float] = []
    above: list[float] = []
    for score in scores:
        low, high = score.ends or (score.value, score.value)
        below.append(score.value - low)
        above.append(high - score.value)
    return [below, above]
