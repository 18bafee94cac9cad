"""From the probes of a record to its values: which probes count, which belong together, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from kecore.evaluate.metrics import AnsweredProbe, Metric, metrics_of
from kecore.evaluate.protocol import Protocol

__all__ = ["Outcomes", "measure", "outcomes", "reason"]


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What a metric found on one record.

    Args:
        axes: by axis (empty where probes have none) the value of each test.
        probes: by axis the number of probes behind them.
    """

    axes: Mapping[str, Sequence[float]]
    probes: Mapping[str, int]

    @property
    def tests(self) -> list[float]:
        """The values of all tests."""
        return [value for values in self.axes.values() for value in values]

    @property
    def value(self) -> float:
        """The record's value: the mean over axes of the means over their tests."""
        return fmean(map(fmean, self.axes.values()))


def outcomes(metric: Metric, probes: Sequence[AnsweredProbe], protocol: Protocol) -> Outcomes | None:
    """A metric's values on the tests of one record; None where it has none.

    Probes of one test count once: as the best of them, or as the worst where all are needed. A probe whose conditions
    do not hold on the model before the edit is left out.
    """
    axes: dict[str, dict[str, list[float]]] = {}
    needs: dict[tuple[str, str], str] = {}
    for place, probe in enumerate(probes):
        if probe.kind != metric.kind or probe.holds is False:
            continue
        if (value := metric.value(probe, protocol)) is not None:
            test = probe.test or f"#{place}"
            axes.setdefault(probe.axis, {}).setdefault(test, []).append(value)
            needs[probe.axis, test] = probe.need
    if not axes:
        return None
    return Outcomes(
        {axis: [_one(values, needs[axis, test]) for test, values in tests.items()] for axis, tests in axes.items()},
        {axis: sum(map(len, tests.values())) for axis, tests in axes.items()},
    )


def _one(values: Iterable[float], need: str) -> float:
    return max(values) if need == "any" else min(values)


def measure(probes: Sequence[AnsweredProbe], protocol: Protocol, *, compared: bool) -> Mapping[str, tuple[float, int]]:
    """One record's values.

    Args:
        probes: its answered probes.
        protocol: how to read them.
        compared: the probes carry what needs the model before the edit.

    Returns:
        Metric key (and, for axes, ``key.axis``) to the record's value and the number of probes behind it.
    """
    found: dict[str, tuple[float, int]] = {}
    for metric in metrics_of(protocol):
        if not metric.applies(protocol, compared):
            continue
        if (made := outcomes(metric, probes, protocol)) is not None:
            found[metric.key] = (made.value, sum(made.probes.values()))
            found |= {f"{metric.key}.{axis}": (fmean(v), made.probes[axis]) for axis, v in made.axes.items() if axis}
    return found


def reason(metric: Metric, probes: Sequence[AnsweredProbe]) -> str:
    """Why a metric has no value on a record: what the record lacks, in a few words."""
    mine = [probe for probe in probes if probe.kind == metric.kind]
    if not mine:
        return f"no {metric.kind.replace('_', '-')} probe"
    if all(probe.holds is False for probe in mine):
        return "conditions that do not hold before the edit"
    return metric.lacks
