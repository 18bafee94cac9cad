"""Plots of the page, drawn as SVG by hand: they need no script, no network and no package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from kecore.evaluate.result import Score
from kecore_bench.report.figures import Curve, Scatter, Stages, stage_colour
from kecore_bench.report.text import shown

__all__ = ["curve", "scatter", "stage_bars"]

_LEFT, _TOP, _SIDE, _NAMES, _LINE = 52, 14, 380, 160, 15
"""Pixels: of the left margin, the top margin, a plot's side, the column of names, and a line of text."""
_DODGE = 5
"""Pixels between the points of two methods over one number of facts."""

Colour = Callable[[str], str]


def scatter(plot: Scatter, colour: Colour) -> str:
    """Both scores from 0 to 1, with their 95 % intervals, and each name beside its point's height; hollow: papers."""
    height = _TOP + _SIDE + 42
    parts = [_axes(plot.x, plot.y, [(tick / 5, f"{tick / 5:.1f}") for tick in range(6)])]
    places = [(label, _x(x.value), _y(y.value)) for label, x, y in plot.points]
    for (label, cx, cy), (_, x, y) in zip(places, plot.points, strict=True):
        parts.append(_whisker(cx, cy, y, vertical=True, colour=colour(label)))
        parts.append(_whisker(cx, cy, x, vertical=False, colour=colour(label)))
        tip = escape(f"{label}: {plot.x} {shown(x)}, {plot.y} {shown(y)}")
        parts.append(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4.5" fill="{colour(label)}"><title>{tip}</title></circle>'
        )
    for label, run, x, y in plot.published:
        tip = escape(f"{label}: {plot.x} {x:.3f}, {plot.y} {y:.3f}")
        ring = f'cx="{_x(x):.1f}" cy="{_y(y):.1f}" r="4.5" fill="none" stroke="{colour(run)}" stroke-width="1.5"'
        parts.append(f"<circle {ring}><title>{tip}</title></circle>")
    parts += _names(places, colour)
    return _svg(_LEFT + _SIDE + _NAMES, height, parts, f"{plot.y} against {plot.x}")


def curve(plot: Curve, colour: Colour) -> str:
    """A score over the number of edited facts."""
    most = max(count for line in plot.lines for count, _ in line.points)
    parts = [_axes("facts edited so far", plot.y, [(count / most, str(count)) for count in plot.ticks])]
    ends: list[tuple[str, float, float]] = []
    for number, line in enumerate(plot.lines):
        shift = _DODGE * (number - (len(plot.lines) - 1) / 2)  # or bars of several methods would cover each other
        places = [(_x(count / most) + shift, _y(score.value)) for count, score in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour(line.label)}" stroke-width="2"/>')
        for (x, y), (count, score) in zip(places, line.points, strict=True):
            parts.append(_whisker(x, y, score, vertical=True, colour=colour(line.label)))
            tip = escape(f"{line.label}: {shown(score)} of {count} facts")
            dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour(line.label)}"><title>{tip}</title></circle>'
            parts.append(dot)
        ends.append((line.label, *places[-1]))
    parts += _names(ends, colour)
    return _svg(_LEFT + _SIDE + _NAMES, _TOP + _SIDE + 42, parts, f"{plot.y} over the number of edited facts")


def stage_bars(plot: Stages) -> str:
    """Seconds for each fact, a bar a method, a colour a stage."""
    longest = max(total for *_, total in plot.rows) or 1.0
    left, width, high, step = 160, 950, 16, 26
    parts: list[str] = []
    for place, (label, seconds, total) in enumerate(plot.rows):
        y, x = 6 + place * step, float(left)
        parts.append(_text(left - 8, y + 12, label, "end"))
        for name in plot.names:
            share = seconds.get(name, 0.0) / longest * width
            if share > 0:
                tip = escape(f"{label}, {name}: {seconds[name]:.3f} s for each fact")
                colour = stage_colour(plot.names, name)
                parts.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{share:.2f}" height="{high}" fill="{colour}">'
                    f"<title>{tip}</title></rect>"
                )
                x += share
        parts.append(_text(x + 6, y + 12, f"{total:.2f} s"))
    y, x = 6 + len(plot.rows) * step + 8, left
    for name in plot.names:
        wide = 22 + 7 * len(name)
        if x + wide > left + width + 60:
            x, y = left, y + 18
        parts.append(f'<rect x="{x}" y="{y}" width="10" height="10" fill="{stage_colour(plot.names, name)}"/>')
        parts.append(_text(x + 14, y + 9, name))
        x += wide
    return _svg(left + width + 60, y + 20, parts, "seconds of editing for each fact, by stage")


def _axes(x_name: str, y_name: str, ticks: Sequence[tuple[float, str]]) -> str:
    parts: list[str] = []
    for tick in range(6):
        y = _y(tick / 5)
        parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + _SIDE}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{tick / 5:.1f}", "end"))
    for place, name in ticks:
        x = _x(place)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_TOP + _SIDE}" class="grid"/>')
        parts.append(_text(x, _TOP + _SIDE + 16, name, "middle"))
    parts.append(_text(_LEFT + _SIDE / 2, _TOP + _SIDE + 35, x_name, "middle", "axis"))
    middle = _TOP + _SIDE / 2
    turned = f'<text x="14" y="{middle}" text-anchor="middle" class="axis" transform="rotate(-90 14 {middle})">'
    return "".join([*parts, f"{turned}{escape(y_name)}</text>"])


def _names(places: Sequence[tuple[str, float, float]], colour: Colour) -> list[str]:
    """Names in a column on the right, pushed apart, each with a thin straight line to its point.

    Of points of one height the leftmost has the lowest name, so that no line runs along or across another.
    """
    parts: list[str] = []
    ordered = sorted(places, key=lambda place: (round(place[2]), -place[1]))
    heights = [y for *_, y in ordered]
    for place in range(1, len(heights)):
        heights[place] = max(heights[place], heights[place - 1] + _LINE)
    over = max(0.0, heights[-1] - (_TOP + _SIDE)) if heights else 0.0
    x = _LEFT + _SIDE + 22
    for (label, px, py), y in zip(ordered, heights, strict=True):
        ny = max(y - over, 8.0)
        line = f'x1="{px:.1f}" y1="{py:.1f}" x2="{x - 3:.1f}" y2="{ny:.1f}" stroke="{colour(label)}"'
        parts.append(f'<line {line} stroke-width="0.8" stroke-dasharray="1 3"/>')
        parts.append(f'<text x="{x}" y="{ny + 4:.1f}" fill="{colour(label)}">{escape(label)}</text>')
    return parts


def _whisker(x: float, y: float, score: Score, *, vertical: bool, colour: str) -> str:
    if score.ends is None:
        return ""
    low, high = score.ends
    ends = (x, x, _y(low), _y(high)) if vertical else (_x(low), _x(high), y, y)
    x1, x2, y1, y2 = (f"{end:.1f}" for end in ends)
    return f'<line x1="{x1}" x2="{x2}" y1="{y1}" y2="{y2}" stroke="{colour}" stroke-width="1.2" opacity="0.55"/>'


def _x(share: float) -> float:
    return _LEFT + _SIDE * share


def _y(share: float) -> float:
    return _TOP + _SIDE * (1 - share)


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    shape = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{shape}>{escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    return f'<svg {size} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
