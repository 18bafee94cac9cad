"""Says what tables show of a protocol's metrics: headings, names and meanings, in the order of the metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from kecore.api.types import ProbeKind
from kecore.evaluate.metrics import SCORE_PARTS, Metric, metrics_of
from kecore.evaluate.protocol import Protocol

__all__ = ["Column", "columns_of", "described", "in_order"]


@dataclass(frozen=True)
class Column:
    """A score as tables show it.

    Args:
        key: of the score.
        kind: the probes it is taken on.
        heading: stands above its column.
        name: the same in words, for a line of its own.
        meaning: what it says.
        core: whether it stands in the main table.
        lower: whether lower values are better.
    """

    key: str
    kind: ProbeKind
    heading: str
    name: str
    meaning: str
    core: bool
    lower: bool = False


_SCORE = Column("score", "edit", "S", "score (S)", "harmonic mean of ES, PS and NS", core=True)


def columns_of(protocol: Protocol) -> dict[str, Column]:
    """Return the scores that a protocol takes, by key, without axes."""
    columns: dict[str, Column] = {}
    for metric in metrics_of(protocol):
        columns[metric.key] = _column(metric)
        if metric.key == SCORE_PARTS[-1]:
            columns[_SCORE.key] = _SCORE
    return columns


def _column(metric: Metric) -> Column:
    heading = metric.heading or metric.name
    name = f"{metric.name} ({heading})" if metric.heading.isupper() else metric.name
    return Column(metric.key, metric.kind, heading, name, metric.meaning, metric.core, metric.lower)


def described(columns: Mapping[str, Column], key: str) -> Column:
    """Return the column of a score, which may be that of an axis (``key.axis``)."""
    base, _, axis = key.partition(".")
    column = columns[base]
    if not axis:
        return column
    words = axis.replace("_", " ")
    heading, name = f"{column.heading}: {words}", f"{column.name}: {words}"
    return replace(column, key=key, heading=heading, name=name, core=False)


def in_order(columns: Mapping[str, Column], keys: Iterable[str]) -> list[str]:
    """Return keys in the order of the metrics, each followed by its axes."""
    order = {key: index for index, key in enumerate(columns)}
    return sorted(keys, key=lambda key: (order[key.partition(".")[0]], key))
