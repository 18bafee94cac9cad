"""Confidence intervals of means over records, against closed forms and exact coverage."""

from __future__ import annotations

import math
from itertools import product
from statistics import fmean

import pytest

from kecore.evaluate.intervals import Z, interval

UNIT = (0.0, 1.0)


def of(values: list[float], bounds: tuple[float, float] = UNIT) -> tuple[float, float] | None:
    mean = fmean(values)
    return interval(mean, sum((value - mean) ** 2 for value in values), len(values), bounds)


def test_zeros_and_ones_have_wilsons_interval() -> None:
    assert of([1.0] * 7 + [0.0] * 3) == pytest.approx((0.39678, 0.89221), abs=1e-5)
    assert of([1.0] * 10) == pytest.approx((10 / (10 + Z**2), 1.0))
    assert of([0.0] * 100) == pytest.approx((0.0, Z**2 / (100 + Z**2)))
    for end in of([1.0] * 99 + [0.0]) or ():
        assert (0.99 - end) ** 2 == pytest.approx(Z**2 * end * (1 - end) / 100), "his equation"


def test_the_mean_lies_between_the_ends_whatever_the_rounding() -> None:
    for count, ones in product(range(2, 40), range(40)):
        values = [1 / 3] * count + [1.0] * ones
        low, high = of(values) or (0, 0)
        assert 0 <= low <= fmean(values) <= high <= 1


def test_fractions_have_a_shorter_one_by_hand() -> None:
    # m = 0.5, S = 0.25, d = (0.25 + z^2/4) / (1 + z^2/4): Wilson's interval of 4 / d records.
    records = 4 * (1 + Z**2 / 4) / (0.25 + Z**2 / 4)
    half = Z * math.sqrt(0.25 / records + Z**2 / (4 * records**2)) / (1 + Z**2 / records)
    assert of([0.25, 0.25, 0.75, 0.75]) == pytest.approx((0.5 - half, 0.5 + half))
    assert of([0.5, 0.5, 0.5]) != (0.5, 0.5), "records that agree do not make the mean certain"


def test_other_bounds_are_a_change_of_scale() -> None:
    shares = [0.1, 0.5, 1.0, 0.9]
    low, high = of(shares) or (0, 0)
    assert of([2 * share - 1 for share in shares], (-1.0, 1.0)) == pytest.approx((2 * low - 1, 2 * high - 1))


def test_without_bounds_it_is_the_normal_one() -> None:
    half = Z * math.sqrt(2 / 2)  # variance 2 of 1 and 3
    assert of([1.0, 3.0], (-math.inf, math.inf)) == pytest.approx((2 - half, 2 + half))
    assert of([1.0, 3.0], (0.5, math.inf)) == pytest.approx((0.5, 2 + half))
    assert of([1.0]) is None


@pytest.mark.parametrize("share", [0.5, 0.85, 0.97])
def test_it_covers_the_mean_of_fractions(share: float) -> None:
    """Twelve records of two probes each, every outcome weighed by its probability."""
    chances = [(1 - share) ** 2, 2 * share * (1 - share), share**2]
    covered = 0.0
    for wrong, half in product(range(13), repeat=2):
        if wrong + half <= 12:
            ways = math.comb(12, wrong) * math.comb(12 - wrong, half)
            found = of([0.0] * wrong + [0.5] * half + [1.0] * (12 - wrong - half)) or (0, 0)
            if found[0] <= share <= found[1]:
                covered += ways * chances[0] ** wrong * chances[1] ** half * chances[2] ** (12 - wrong - half)
    assert covered > 0.93
