"""An evaluation: rows, scores with their uncertainty, and the protocol they were taken by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, zip_longest
from statistics import fmean, harmonic_mean
from typing import TYPE_CHECKING, Any

from kecore.api.errors import ConfigError, PluginError
from kecore.api.show import html_table
from kecore.evaluate.answers import AnsweredProbe, RecordResult
from kecore.evaluate.intervals import interval
from kecore.evaluate.measuring import measure, reason
from kecore.evaluate.metrics import SCORE_PARTS, UNIT, divergence, metrics_of, stability
from kecore.evaluate.protocol import Protocol, same_protocol

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Evaluation", "Score", "compare", "merge"]

_ROUNDING = 1e-6
"""How far a value may be outside its metric's bounds, as a cosine of float32 vectors is."""


@dataclass(frozen=True, slots=True)
class Score:
    """A mean over records.

    Args:
        value: the mean.
        ends: its 95 % confidence interval over records (:func:`kecore.evaluate.intervals.interval`; for ``score``
            with the variance of the delta method); None for a single record, and for a ``score`` of 0. It speaks of
            the choice of records, not of other seeds.
        records: records behind it.
        probes: probes behind it.
    """

    value: float
    ends: tuple[float, float] | None
    records: int
    probes: int

    def to_json(self) -> dict[str, float | int | None]:
        """Return the figures as JSON values."""
        low, high = self.ends or (None, None)
        return {"value": self.value, "low": low, "high": high, "records": self.records, "probes": self.probes}


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What a model does on a set of records.

    Make it with :func:`kecore.evaluate.evaluate`; scores are worked out from ``rows`` when it is made.

    Args:
        protocol: how the scores were taken.
        rows: one a record, in order.
        compared: the rows carry stability against a model before the edit (:func:`compare`).
        distributions: prompt to next-token log-probabilities ``[vocab]``, where a metric compares them.
    """

    protocol: Protocol
    rows: tuple[RecordResult, ...]
    compared: bool = False
    distributions: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __repr__(self) -> str:
        main = [f"{key} {score.value:.3f}" for key, score in self.scores.items() if "." not in key]
        return f"<Evaluation of {len(self.rows)} records by protocol {self.protocol.hash()}: {', '.join(main[:4])}>"

    def _repr_html_(self) -> str:
        rows: list[tuple[object, ...]] = []
        for key, score in self.scores.items():
            ends = "" if score.ends is None else f"{score.ends[0]:.3f} to {score.ends[1]:.3f}"
            rows.append((key, f"{score.value:.3f}", ends, score.records))
        title = f"{len(self.rows)} records by protocol {self.protocol.hash()}: {self.protocol.describe()}"
        return html_table(title, ("score", "value", "95 %", "records"), rows)

    @cached_property
    def _measured(self) -> list[Mapping[str, tuple[float, int]]]:
        return [measure(row.probes, self.protocol, compared=self.compared) for row in self.rows]

    @property
    def values(self) -> list[dict[str, float]]:
        """Each record's own value by metric, in the order of ``rows``."""
        rows: list[dict[str, float]] = []
        for measured in self._measured:
            rows.append({key: value for key, (value, _) in measured.items()})
        return rows

    @cached_property
    def scores(self) -> dict[str, Score]:
        """Score by metric; a metric that no record has a probe for is absent, never 0.

        Keys are those of :func:`metrics.metrics_of`, ``key.axis`` for each axis of locality and portability,
        and ``score``, the harmonic mean of edit, paraphrase and neighbourhood success.
        """
        bounds = {metric.key: metric.bounds for metric in metrics_of(self.protocol)}
        keys = _keys(self._measured, self.protocol)
        scores = {key: _mean(self._measured, key, bounds[key.partition(".")[0]]) for key in keys}
        if all(key in scores for key in SCORE_PARTS):
            scores["score"] = _harmonic(self._measured, scores)
        return scores

    @cached_property
    def missing(self) -> dict[str, dict[str, str]]:
        """The records that a metric could not be taken on, and what each of them lacks, by metric and id."""
        missing: dict[str, dict[str, str]] = {}
        for metric in metrics_of(self.protocol):
            if not metric.applies(self.protocol, self.compared):
                continue
            for row, measured in zip(self.rows, self._measured, strict=True):
                if metric.key not in measured:
                    missing.setdefault(metric.key, {})[row.id] = reason(metric, row.probes)
        return missing

    @property
    def skipped(self) -> dict[str, int]:
        """Number of records that a metric could not be taken on, where there are any."""
        return {key: len(reasons) for key, reasons in self.missing.items()}

    def to_json(self) -> dict[str, Any]:
        """Return protocol, scores and every row as JSON values."""
        return {
            "protocol": self.protocol.to_json(),
            "protocol_hash": self.protocol.hash(),
            "compared": self.compared,
            "records": len(self.rows),
            "scores": {key: score.to_json() for key, score in self.scores.items()},
            "missing": self.missing,
            "rows": [{**row.to_json(), "values": values} for row, values in zip(self.rows, self.values, strict=True)],
        }


def _keys(measured: Iterable[Mapping[str, Any]], protocol: Protocol) -> list[str]:
    """Return all keys that some record has, in the order of the metrics, each followed by its axes."""
    order = {metric.key: i for i, metric in enumerate(metrics_of(protocol))}
    keys = dict.fromkeys(chain.from_iterable(measured))
    return sorted(keys, key=lambda key: (order[key.partition(".")[0]], key))


def _mean(measured: Iterable[Mapping[str, tuple[float, int]]], key: str, bounds: tuple[float, float]) -> Score:
    pairs = [record[key] for record in measured if key in record]
    values = [value for value, _ in pairs]
    low, high = bounds
    if any(not low - _ROUNDING <= value <= high + _ROUNDING for value in values):
        raise PluginError(
            f"metric '{key}' gave values from {min(values):g} to {max(values):g}, but declares the bounds {low:g} and "
            f"{high:g}; correct the metric, or the bounds it is declared with"
        )
    mean = fmean(values)
    ends = interval(mean, sum((value - mean) ** 2 for value in values), len(values), bounds)
    return Score(mean, ends, len(values), sum(count for _, count in pairs))


def _harmonic(measured: Sequence[Mapping[str, tuple[float, int]]], scores: Mapping[str, Score]) -> Score:
    """Take the harmonic mean of the parts' means, as the official CounterFact code forms it.

    The interval's variance follows from the means' joint distribution to first order. A record's influence is its
    share of each mean times dH/dm = H^2 / (3 m^2), so parts measured on the same record are not taken for
    independent.
    """
    scores_of_parts = [scores[key] for key in SCORE_PARTS]
    value = harmonic_mean([score.value for score in scores_of_parts])
    fewest = min(score.records for score in scores_of_parts)
    ends: tuple[float, float] | None = None
    if value > 0:
        squares = 0.0
        for record in measured:
            influence = 0.0
            for key, score in zip(SCORE_PARTS, scores_of_parts, strict=True):
                if key in record:
                    slope = (value / score.value) ** 2 / 3
                    influence += slope * (record[key][0] - score.value) * fewest / score.records
            squares += influence**2
        ends = interval(value, squares, fewest, UNIT)
    most = max(score.records for score in scores_of_parts)
    return Score(value, ends, most, sum(score.probes for score in scores_of_parts))


def compare(before: Evaluation, after: Evaluation) -> Evaluation:
    """Return ``after`` with the scores that need the model before the edit.

    Adds ``locality`` (and its axes), ``neighbourhood_stability``, the divergences of next-token distributions, and
    whatever other metric compares two answers; and takes from ``before`` which probes' conditions hold.

    Args:
        before: the unedited model on the same records.
        after: the edited model.

    Raises:
        ProtocolMismatchError: the protocols differ.
        ConfigError: the records are not the same.
    """
    same_protocol(before.protocol, after.protocol, "the evaluations before and after")
    rows: list[RecordResult] = []
    for index, (old, new) in enumerate(zip_longest(before.rows, after.rows)):
        if old is None or new is None or _questions(old) != _questions(new):
            raise ConfigError(
                f"the evaluations hold different records: at {index} {old and old.id!r} before, "
                f"{new and new.id!r} after; evaluate the same records in the same order"
            )
        pairs = zip(old.probes, new.probes, strict=True)
        rows.append(replace(new, probes=tuple(_compared(a, b, before, after) for a, b in pairs)))
    return Evaluation(after.protocol, tuple(rows), compared=True)


def _compared(old: AnsweredProbe, new: AnsweredProbe, before: Evaluation, after: Evaluation) -> AnsweredProbe:
    values = dict(new.measured)
    for metric in metrics_of(after.protocol):
        if metric.kind != new.kind:
            continue
        value = None
        if metric.pair is not None:
            value = metric.pair(old, new)
        elif metric.distribution and new.prompt in before.distributions and new.prompt in after.distributions:
            value = divergence(before.distributions[new.prompt], after.distributions[new.prompt])
        if value is not None:
            values[metric.key] = value
    return replace(new, stable=stability(old, new), holds=old.holds, measured=values)


def _questions(row: RecordResult) -> tuple[Any, ...]:
    return (row.id, *((probe.kind, probe.prompt, probe.answers) for probe in row.probes))


def merge(evaluations: Iterable[Evaluation]) -> Evaluation:
    """Join evaluations of one protocol to one, such as those taken after each edit of a sequence.

    Raises:
        ProtocolMismatchError: the protocols differ.
        ConfigError: there is no evaluation, or some are compared and others not.
    """
    chunks = list(evaluations)
    for chunk in chunks[1:]:
        same_protocol(chunks[0].protocol, chunk.protocol, "the evaluations to be merged")
    if len({chunk.compared for chunk in chunks}) != 1:
        raise ConfigError(f"one or more evaluations, all compared or none, can be merged; got {len(chunks)}")
    rows = tuple(chain.from_iterable(chunk.rows for chunk in chunks))
    return Evaluation(chunks[0].protocol, rows, chunks[0].compared)
