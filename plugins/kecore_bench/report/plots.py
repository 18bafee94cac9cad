"""The page's plots as PNG files, by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kecore.api.errors import MissingDependencyError
from kecore.evaluate.result import Score
from kecore.files import write_atomic
from kecore_bench.report.figures import Curve, Scatter, Stages, colour, curves, scatters, stage_colour, stages
from kecore_bench.report.results import Result, Table, last_moments

__all__ = ["write_plots"]

_ACROSS = 3
"""Panels beside each other; further ones stand below."""
_DODGE = 0.012
"""Distance of two methods' points over one number of facts, as a share of the largest number."""


def write_plots(tables: Sequence[Table], results: Sequence[Result], out: Path) -> list[Path]:
    """Write the plots of all tables.

    Returns:
        The files: ``scatter-1.png``, ``stages-1.png`` and, of sequences, ``retention-1.png``, and so on.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        StorageError: a file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError(
            "PNG is drawn by matplotlib, which is not installed: pip install 'kecore[plot]'"
        ) from None
    written: list[Path] = []
    last = last_moments(tables)

    def draw(name: str, panels: int, wide: float, fill: Any) -> None:
        across = min(panels, _ACROSS)
        down = -(-panels // across)
        figure: Any = Figure(figsize=(wide * across, 4.2 * down), layout="constrained")
        fill([figure.add_subplot(down, across, place + 1) for place in range(panels)])
        write = write_atomic(out / name, lambda path: figure.savefig(path, dpi=150, format="png"))
        written.append(write)

    for number, table in enumerate(tables, 1):
        if plots := scatters(table):
            draw(f"scatter-{number}.png", len(plots), 4.6, lambda axes, p=plots, t=table: _scatters(axes, p, t))
        if table not in last:
            continue
        if (found := stages(table)).rows:
            draw(f"stages-{number}.png", 1, 7.0, lambda axes, f=found, t=table: _stages(axes[0], f, t))
        same = [result for result in results if result.spec.group == table.first.spec.group]
        if lines := curves(same):
            draw(f"retention-{number}.png", len(lines), 4.6, lambda axes, c=lines, t=table: _curves(axes, c, t))
    return written


def _scatters(axes: Sequence[Any], plots: Sequence[Scatter], table: Table) -> None:
    for axis, plot in zip(axes, plots, strict=True):
        for label, x, y in plot.points:
            errors = {"xerr": _errors([x]), "yerr": _errors([y])}
            axis.errorbar(x.value, y.value, **errors, fmt="o", color=colour(table, label), label=label, lw=1)
        for place, (_, run, x, y) in enumerate(plot.published):
            axis.plot(x, y, "o", mfc="none", color=colour(table, run), label="" if place else "rings: papers")
        axis.set(xlabel=plot.x, ylabel=plot.y, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
    axes[0].set_title(table.title, fontsize=9, loc="left")
    _legend(axes[0])


def _curves(axes: Sequence[Any], plots: Sequence[Curve], table: Table) -> None:
    for axis, plot in zip(axes, plots, strict=True):
        for number, line in enumerate(plot.lines):
            # Bars of several methods would cover each other.
            shift = _DODGE * plot.ticks[-1] * (number - (len(plot.lines) - 1) / 2)
            counts = [count + shift for count, _ in line.points]
            values = [score.value for _, score in line.points]
            errors = _errors([score for _, score in line.points])
            axis.errorbar(
                counts, values, errors, marker="o", color=colour(table, line.label), label=line.label, elinewidth=1
            )
        axis.set(xlabel="facts edited so far", ylabel=plot.y, ylim=(-0.02, 1.02), xticks=plot.ticks)
        axis.grid(alpha=0.3)
    axes[0].set_title(_title(table), fontsize=9, loc="left")
    _legend(axes[0])


def _errors(scores: Sequence[Score]) -> list[list[float]]:
    """Lengths of whiskers below and above."""
    ends = [score.ends or (score.value, score.value) for score in scores]
    pairs = list(zip(scores, ends, strict=True))
    return [[score.value - low for score, (low, _) in pairs], [high - score.value for score, (_, high) in pairs]]


def _legend(axis: Any) -> None:
    """Names beside the panels: inside one they would lie on the corner where the best points are."""
    handles, labels = axis.get_legend_handles_labels()
    axis.figure.legend(handles, labels, loc="outside right upper", fontsize=8)


def _title(table: Table) -> str:
    """The table's title without its moment, of which the plot has several."""
    return table.title.partition(", at-")[0]


def _stages(axis: Any, found: Stages, table: Table) -> None:
    labels = [label for label, *_ in found.rows]
    left = [0.0] * len(labels)
    for name in found.names:
        widths = [seconds.get(name, 0.0) for _, seconds, _ in found.rows]
        axis.barh(labels, widths, left=left, label=name, color=stage_colour(found.names, name))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set(xlabel="seconds of editing for each fact")
    axis.set_title(_title(table), fontsize=9, loc="left")
    axis.legend(fontsize=8)
