"""The curves of what changes as a sequence of edits grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kecore_bench.report.figures import Style
from kecore_bench.report.growth import Growth, GrowthLine
from kecore_bench.report.plot import MARK, Plot, look_of, make_panels, name_beside

__all__ = ["draw_growth"]

_MEBIBYTE = 2**20


def draw_growth(lines: Sequence[GrowthLine], looks: Mapping[str, Style]) -> Plot:
    """Draw held-out text, seconds and bytes over the facts edited so far, a line a method."""
    panels: dict[str, Callable[[Growth], float | None]] = {
        "perplexity, times the base's": lambda point: None if point.drift is None else point.drift.perplexity_ratio,
        "same next word as the base": lambda point: None if point.drift is None else point.drift.agreement,
        "seconds for each fact of a step": lambda point: point.seconds,
        "KiB of edits for each fact": lambda point: point.edit_bytes / 1024,
        "MiB remembered for the next edit": lambda point: _mebibytes(point.state_bytes),
    }
    values_of: dict[str, list[tuple[GrowthLine, list[tuple[int, float]]]]] = {}
    for name, read in panels.items():
        curves: list[tuple[GrowthLine, list[tuple[int, float]]]] = []
        for line in lines:
            values = [(point.facts, read(point)) for point in line.points]
            known = [(facts, value) for facts, value in values if value is not None]
            if known:
                curves.append((line, known))
        if curves:
            values_of[name] = curves
    figure, axes = make_panels(len(values_of), 4.6)
    plot = Plot("growth", "As the sequence grows: held-out text, seconds and bytes", figure)
    for axis, (name, curves) in zip(axes, values_of.items(), strict=True):
        for line, points in curves:
            look = {**look_of(looks[line.label]), "ms": 0.6 * MARK, "ls": "-"}
            axis.plot([facts for facts, _ in points], [value for _, value in points], **look, lw=1, label=line.label)
            for facts, value in points:
                (dot,) = axis.plot(facts, value, **{**look, "ls": "none"})
                plot.tell(dot, f"{line.label}, {facts} facts: {value:.3f}")
        axis.set(xlabel="facts edited so far", ylabel=name)
        axis.grid(alpha=0.3)
    name_beside(figure, axes[0])
    return plot


def _mebibytes(size: int | None) -> float | None:
    return None if size is None else size / _MEBIBYTE
