"""The target stage: what is done to optimised values before they are written."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["Target", "as_found", "in_turn"]

Target = Callable[[int, Callable[[], Tensor], Tensor, dict[str, Tensor]], Tensor]
"""``target(layer, outputs, delta, state)`` to another ``delta [u, d_model]``: ``layer`` is the one that the values are
for, ``outputs()`` gives what its value projection gives now, ``[u, d_model]``, and ``state`` survives to the next edit
of the sequence."""


def as_found(_layer: int, _outputs: Callable[[], Tensor], delta: Tensor, _state: dict[str, Tensor]) -> Tensor:
    """Return the values as they were optimised."""
    return delta


def in_turn(first: Target, second: Target) -> Target:
    """Return the stage that lets one stage change the values, and then another."""

    def target(layer: int, outputs: Callable[[], Tensor], delta: Tensor, state: dict[str, Tensor]) -> Tensor:
        return second(layer, outputs, first(layer, outputs, delta, state), state)

    return target
