"""Packing token rows of different lengths into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["micro_batches"]


def micro_batches(lengths: Sequence[int], costs: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Group rows of similar length into batches that keep within a budget.

    Args:
        lengths: tokens of each row.
        costs: what each row costs on top of its padded tokens, in the same unit.
        budget: most that ``rows * width + sum(costs)`` of a batch may be; a single row may exceed it.

    Yields:
        Indices of one batch's rows, the longest rows first, so that a batch that does not fit into memory
        fails at the start of a run and not at its end.

    Examples:
        >>> list(micro_batches([3, 9, 8], [0, 0, 0], 18))
        [[1, 2], [0]]
    """
    batch: list[int] = []
    width = cost = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):  # of equal lengths in their order
        if batch and width * (len(batch) + 1) + cost + costs[index] > budget:
            yield batch
            batch, cost = [], 0
        if not batch:
            width = lengths[index]
        batch.append(index)
        cost += costs[index]
    if batch:
        yield batch
