"""The plots of a report, drawn by matplotlib: as SVG inside the page, and as PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from kecore.api.errors import MissingDependencyError
from kecore.evaluate.result import Score
from kecore.files import write_atomic
from kecore_bench.report.figures import Curve, Scatter, Stages, colour, curves, scatters, stage_colour, stages
from kecore_bench.report.results import Result
from kecore_bench.report.table import Table, last_moments
from kecore_bench.report.text import shown

__all__ = ["INSTALL", "Plot", "drawn_plots", "need_matplotlib", "write_plots"]

INSTALL = "figures are drawn by matplotlib, which is not installed: pip install 'kecore[plot]'"

_ACROSS = 3
"""Panels beside each other; further ones stand below."""
_DODGE = 0.012
"""Distance of two methods' points over one number of facts, as a share of the largest number."""
_NAMES_INCHES = 2.2
"""Room for the names of the colours, beside the panels."""
_BAR_INCHES = 0.28
"""Height of a method's bar."""


@dataclass
class Plot:
    """One plot of a table: a matplotlib figure, and what it says where the pointer is held over a part of it.

    Args:
        name: ``scatter``, ``retention`` or ``stages``.
        title: what it shows.
        figure: the :class:`matplotlib.figure.Figure`.
        caption: stands below it.
        tips: the text for each part, by the id that the part has in the SVG.
    """

    name: str
    title: str
    figure: Any
    caption: str = ""
    tips: dict[str, str] = field(default_factory=dict)

    def tell(self, artist: Any, text: str) -> None:
        """Show ``text`` where the pointer is held over a part of the figure."""
        gid = f"tip-{len(self.tips)}"
        artist.set_gid(gid)
        self.tips[gid] = text

    def to_svg(self) -> str:
        """Return the figure as an ``<svg>`` element for an HTML page; its text stays text."""
        import matplotlib

        buffer = io.StringIO()
        # Without the salt the ids in two files of one figure would differ.
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kecore"}):
            nothing = dict.fromkeys(["Creator", "Date", "Format", "Type"])
            self.figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
        text = buffer.getvalue()
        text = text[text.index("<svg") :]  # an XML declaration has no place inside a page
        for gid, tip in self.tips.items():
            text = text.replace(f'<g id="{gid}">', f"<g><title>{escape(tip)}</title>")
        return text.replace("<svg", f'<svg role="img" aria-label="{escape(self.title)}"', 1)

    def write_png(self, path: Path) -> Path:
        """Write the figure as a PNG file.

        Raises:
            StorageError: it cannot be written.
        """
        return write_atomic(path, lambda file: self.figure.savefig(file, dpi=150, format="png"))


def need_matplotlib() -> Any:
    """Return matplotlib's class ``Figure``.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError(INSTALL) from None
    return Figure


def drawn_plots(table: Table, results: Sequence[Result], last: bool) -> list[Plot]:
    """Draw the plots of a table, those that its scores and costs allow.

    Args:
        table: the table.
        results: the runs behind all tables.
        last: the table is of the last moment, which retention and costs are shown with.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    need_matplotlib()
    plots: list[Plot] = []
    scatter_panels = scatters(table)
    if scatter_panels:
        plots.append(_draw_scatters(scatter_panels, table))
    if not last:
        return plots
    curve_panels = curves([result for result in results if result.spec.group == table.first.spec.group])
    if curve_panels:
        plots.append(_draw_curves(curve_panels, table))
    spent = stages(table)
    if spent.rows:
        plots.append(_draw_stages(spent))
    return plots


def write_plots(tables: Sequence[Table], results: Sequence[Result], out: Path) -> list[Path]:
    """Write the plots of all tables as PNG files.

    Returns:
        The files: ``scatter-1.png``, ``stages-1.png`` and, of sequences, ``retention-1.png``, and so on.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        StorageError: a file cannot be written.
    """
    last = last_moments(tables)
    written: list[Path] = []
    need_matplotlib()
    for number, table in enumerate(tables, 1):
        for plot in drawn_plots(table, results, table in last):
            # A file stands alone, so it says what it is of; on the page that stands above the figure.
            title = table.title if plot.name == "scatter" else _title(table)
            plot.figure.suptitle(title, fontsize=9, x=0.01, ha="left")
            written.append(plot.write_png(out / f"{plot.name}-{number}.png"))
    return written


def _panels(count: int, width: float) -> tuple[Any, list[Any]]:
    """Make a figure with so many panels, each of ``width`` inches, and room for names beside them."""
    across = min(count, _ACROSS)
    down = math.ceil(count / across)
    figure = need_matplotlib()(figsize=(width * across + _NAMES_INCHES, 4.2 * down), layout="constrained")
    return figure, [figure.add_subplot(down, across, index + 1) for index in range(count)]


def _draw_scatters(panels: Sequence[Scatter], table: Table) -> Plot:
    """Draw both scores from 0 to 1 with their 95 % intervals, a point a method; rings are figures of papers."""
    figure, axes = _panels(len(panels), 4.6)
    rings = " Rings: figures of papers." if any(panel.published for panel in panels) else ""
    caption = f"Bars: 95 % confidence intervals.{rings} Top right is best."
    plot = Plot("scatter", "Success against locality", figure, caption)
    for axis, panel in zip(axes, panels, strict=True):
        for point in panel.points:
            bars = axis.errorbar(
                point.x.value,
                point.y.value,
                xerr=_whiskers([point.x]),
                yerr=_whiskers([point.y]),
                fmt="o",
                color=colour(table, point.label),
                label=point.label,
                lw=1,
            )
            plot.tell(bars.lines[0], f"{point.label}: {panel.x} {shown(point.x)}, {panel.y} {shown(point.y)}")
        for index, point in enumerate(panel.published):
            name = "rings: papers" if index == 0 else ""  # one entry of the legend for all of them
            (ring,) = axis.plot(point.x, point.y, "o", mfc="none", color=colour(table, point.beside), label=name)
            plot.tell(ring, f"{point.label}: {panel.x} {point.x:.3f}, {panel.y} {point.y:.3f}")
        axis.set(xlabel=panel.x, ylabel=panel.y, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
    _name_beside(figure, axes[0])
    return plot


def _draw_curves(panels: Sequence[Curve], table: Table) -> Plot:
    """Draw a score of all facts edited so far over their number, a line a method."""
    figure, axes = _panels(len(panels), 4.6)
    plot = Plot("retention", "Retention: all facts edited so far, scored again on the way", figure)
    for axis, panel in zip(axes, panels, strict=True):
        for number, line in enumerate(panel.lines):
            # Bars of several methods would cover each other.
            shift = _DODGE * panel.ticks[-1] * (number - (len(panel.lines) - 1) / 2)
            counts = [point.facts + shift for point in line.points]
            scores = [point.score for point in line.points]
            values = [score.value for score in scores]
            line_colour = colour(table, line.label)
            axis.errorbar(
                counts, values, _whiskers(scores), marker="o", color=line_colour, elinewidth=1, label=line.label
            )
            for count, point in zip(counts, line.points, strict=True):
                (dot,) = axis.plot(count, point.score.value, "o", color=line_colour)
                plot.tell(dot, f"{line.label}: {shown(point.score)} of {point.facts} facts")
        axis.set(xlabel="facts edited so far", ylabel=panel.y, ylim=(-0.02, 1.02), xticks=panel.ticks)
        axis.grid(alpha=0.3)
    _name_beside(figure, axes[0])
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
    _name_beside(figure, axis)
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


def _name_beside(figure: Any, axis: Any) -> None:
    """Name the colours beside the panels: inside one the names would lie where the best points are."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)


def _title(table: Table) -> str:
    """Return the table's title without its moment, of which the plot has several."""
    return table.title.partition(", at-")[0]
