"""Which layers a method edits when nobody names any: they are chosen by depth, not by the model's name."""

from __future__ import annotations

from kecore.model import ModelView

__all__ = ["at_depth"]


def at_depth(view: ModelView, first: float, last: float) -> tuple[int, ...]:
    """Return the layers between two fractions of the stack's depth, both inclusive and rounded to the nearest.

    Args:
        view: the model.
        first: depth of the first layer, 0 for the bottom, 1 for the top.
        last: depth of the last layer.

    Examples:
        MEMIT's layers 4 to 8 of a 32-layer model are ``at_depth(view, 0.13, 0.26)``.
    """
    low, high = _nearest_layer(view, first), _nearest_layer(view, last)
    return tuple(range(low, max(low, high) + 1))


def _nearest_layer(view: ModelView, depth: float) -> int:
    top = len(view.layers) - 1
    return min(top, max(0, round(depth * top)))
