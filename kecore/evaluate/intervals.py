"""Confidence intervals of means over records."""

from __future__ import annotations

import math

__all__ = ["Z", "interval"]

Z = 1.959964
"""97.5 % quantile of the normal distribution: intervals are those of 95 %."""


def interval(value: float, squares: float, count: int, bounds: tuple[float, float]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of a mean.

    Of a metric with two bounds: Wilson's score interval (Wilson 1927, JASA 22) of the mean as a share of the way from
    the lower bound to the upper one, with the effective number of records ``n / d``. The design effect (Kish 1965)

        d = (S + z^2 / 4) / (n m (1 - m) + z^2 / 4)

    is the records' variance over that of zeros and ones with the same mean ``m``. So ``d`` is 1 where all values are 0
    or 1, and the interval is Wilson's own; fractions vary less and have a shorter one. ``z^2 / 4`` is the sum of
    squares of the ``z^2`` records, half of them 0 and half of them 1, that Wilson's centre adds to those at hand: it
    keeps ``d`` from 0 where all records agree. The interval never leaves the bounds and never has the length 0.

    Of a metric without bounds: the normal approximation, cut off at the one bound it may have.

    Args:
        value: the mean.
        squares: sum ``S`` of the squared deviations from it.
        count: number ``n`` of records.
        bounds: least and greatest value of the metric.

    Returns:
        Its ends; None for fewer than two records.
    """
    if count < 2:
        return None
    low, high = bounds
    width = high - low
    if math.isinf(width):
        half = Z * math.sqrt(squares / (count - 1) / count)
        return max(value - half, low), min(value + half, high)
    mean = min(max((value - low) / width, 0.0), 1.0)
    variance, added = mean * (1 - mean), Z**2 / 4
    n = count * (count * variance + added) / (squares / width**2 + added)
    centre, shrunk = mean + Z**2 / (2 * n), 1 + Z**2 / n
    half = Z * math.sqrt(variance / n + Z**2 / (4 * n**2))
    # Both ends are on their sides of the mean, but for rounding.
    ends = (max((centre - half) / shrunk, 0.0), min((centre + half) / shrunk, 1.0))
    return min(low + width * ends[0], value), max(low + width * ends[1], value)
