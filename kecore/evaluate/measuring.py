"""From the probes of a record to its values: which probes count, which belong together, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

from kecore.evaluate.answers import AnsweredProbe
from kecore.evaluate.metrics import Metric, metrics_of
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
        return list(chain.from_iterable(self.axes.values()))

    @property
    def value(self) -> float:
        """The record's value: the mean over axes of the means over their tests."""
        return fmean(map(fmean, self.axes.values()))


def outcomes(metric: Metric, probes: Sequence[AnsweredProbe], protocol: Protocol) -> Outcomes | None:
    """Return a metric's values on the tests of one record; None where it has none.

    Probes of one test count once: as the best of them, or as the worst where all are needed. A probe whose conditions
    do not hold on the model before the edit is left out.
    """
    axes: dict[str, dict[str, list[float]]] = {}
    needs: dict[tuple[str, str], str] = {}
    for index, answered in enumerate(probes):
        if answered.kind != metric.kind or answered.holds is False:
            continue
        if (value := metric.value(answered, protocol)) is None:
            continue
        probe = answered.probe
        test = probe.test or f"#{index}"  # a probe without one is a test by itself
        axes.setdefault(probe.axis, {}).setdefault(test, []).append(value)
        needs[probe.axis, test] = probe.need
    if not axes:
        return None
    values: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    for axis, tests in axes.items():
        values[axis] = [_value_of_test(prompts, needs[axis, test]) for test, prompts in tests.items()]
        counts[axis] = sum(map(len, tests.values()))
    return Outcomes(values, counts)


def _value_of_test(values: Iterable[float], need: str) -> float:
    return max(values) if need == "any" else min(values)


def measure(probes: Sequence[AnsweredProbe], protocol: Protocol, *, compared: bool) -> Mapping[str, tuple[float, int]]:
    """Return one record's values.

    Args:
        probes: its answered probes.
        protocol: how to read them.
        compared: the probes carry what needs the model before the edit.

    Returns:
        Metric key (and, for axes, ``key.axis``) to the record's value and the number of probes behind it.
    """
    measured: dict[str, tuple[float, int]] = {}
    for metric in metrics_of(protocol):
        if not metric.applies(protocol, compared):
            continue
        outcome = outcomes(metric, probes, protocol)
        if outcome is None:
            continue
        measured[metric.key] = (outcome.value, sum(outcome.probes.values()))
        for axis, tests in outcome.axes.items():
            if axis:
                measured[f"{metric.key}.{axis}"] = (fmean(tests), outcome.probes[axis])
    return measured


def reason(metric: Metric, probes: Sequence[AnsweredProbe]) -> str:
    """Return why a metric has no value on a record: what the record lacks, in a few words."""
    of_kind = [probe for probe in probes if probe.kind == metric.kind]
    if not of_kind:
        return f"no {metric.kind.replace('_', '-')} probe"
    if all(probe.holds is False for probe in of_kind):
        return "conditions that do not hold before the edit"
    return metric.lacks
