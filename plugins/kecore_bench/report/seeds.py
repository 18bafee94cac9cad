"""Runs that differ by nothing but the seed: which these are, and one score for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from kecore.evaluate.protocol import Protocol, same_protocol
from kecore.evaluate.result import Score

if TYPE_CHECKING:
    from kecore_bench.report.table import Table

__all__ = ["join_scores", "join_tables", "same_but_seed", "without_seed"]


def without_seed(protocol: Protocol) -> Protocol:
    """Return a protocol with the default seed: what protocols that differ by their seed alone have in common."""
    return protocol.model_copy(update={"seed": Protocol().seed})


def same_but_seed(one: Protocol, other: Protocol, what: str) -> None:
    """Refuse protocols that differ by more than their seeds; arguments and errors as of :func:`same_protocol`."""
    if without_seed(one).hash() != without_seed(other).hash():
        same_protocol(one, other, what)


def join_tables(tables: Iterable[Table]) -> list[list[Table]]:
    """Return tables in groups of those that differ by nothing but the seed."""
    groups: dict[tuple[object, ...], list[Table]] = {}
    for table in tables:
        groups.setdefault((table.first.spec.group, table.moment), []).append(table)
    return list(groups.values())


def join_scores(scores: Sequence[Score]) -> Score:
    """Return the mean of one method's scores under several seeds.

    Its ends are the mean minus and plus the sample standard deviation over seeds. A single score stays what it is, with
    its interval over records.
    """
    if len(scores) == 1:
        return scores[0]
    values = [score.value for score in scores]
    mean, deviation = fmean(values), stdev(values)
    return Score(mean, (mean - deviation, mean + deviation), scores[0].records, scores[0].probes)
