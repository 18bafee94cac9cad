"""Marks that do not hide each other: their places as numbers, and as pixels of the picture."""

from __future__ import annotations

import math
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from kecore_bench.report.spread import spread_out

places = st.lists(st.tuples(st.floats(0, 300), st.floats(0, 300)), max_size=25)


@given(places, st.integers(0, 12))
def test_no_two_marks_are_nearer_than_the_distance(some: list[tuple[float, float]], equal: int) -> None:
    wanted = some + some[:1] * equal
    spots = spread_out(wanted, 9)
    assert len(spots) == len(wanted)
    assert all(math.dist(one, other) >= 9 for one, other in combinations(spots, 2))
    assert spread_out(wanted, 9) == spots


def test_marks_with_room_stay_at_their_places() -> None:
    far = [(0.0, 0.0), (20.0, 0.0), (0.0, 20.0)]
    assert spread_out(far, 9) == far
    spots = spread_out([(0.0, 0.0), (0.0, 0.0), (9.5, 0.0)], 9)
    assert (spots[0], spots[2]) == ((0.0, 0.0), (9.5, 0.0)), "who is alone is not moved for who is not"
    assert math.dist(spots[1], (0, 0)) < 15
