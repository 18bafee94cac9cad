"""Places for marks of a figure, so that none hides another."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["spread_out"]

_TURN = 12
"""Places that are tried on the first circle around a taken one; wider circles have as many times more."""


def spread_out(places: Sequence[tuple[float, float]], distance: float) -> list[tuple[float, float]]:
    """Return where marks stand that belong to some places, each two at least a distance apart.

    As many marks as there is room for stay at their places. The others go to the nearest free places on circles around
    theirs, so the same places give the same figure.

    Args:
        places: where the marks belong, as (x, y) in any unit of length.
        distance: least distance of two marks, in the same unit.

    Returns:
        The places of the marks, in the same order and unit.
    """
    spots: dict[int, tuple[float, float]] = {}
    for index, place in enumerate(places):
        if all(math.dist(place, spot) >= distance for spot in spots.values()):
            spots[index] = place
    for index, place in enumerate(places):
        circle = 0
        while index not in spots:
            circle += 1
            spot = _nearest_free(place, circle, list(spots.values()), distance)
            if spot is not None:
                spots[index] = spot
    return [spots[index] for index in range(len(places))]


def _nearest_free(
    place: tuple[float, float], circle: int, taken: Sequence[tuple[float, float]], distance: float
) -> tuple[float, float] | None:
    """Return the first free place on a circle around a place; None where all are taken."""
    radius = distance * (1 + 0.25 * (circle - 1)) * 1.001  # rounding must not bring two marks nearer
    count = _TURN * circle
    for number in range(count):
        angle = 2 * math.pi * (number / count + 0.125)  # the first one to the upper right
        spot = (place[0] + radius * math.cos(angle), place[1] + radius * math.sin(angle))
        if all(math.dist(spot, mark) >= distance for mark in taken):
            return spot
    return None
