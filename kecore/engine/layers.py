"""Which layers to edit, when nobody says: by depth, not by model name."""

from __future__ import annotations

from kecore.model import ModelView

__all__ = ["at_depth"]


def at_depth(view: ModelView, first: float, last: float) -> tuple[int, ...]:
    """Layers between two fractions of the stack's depth, both inclusive and rounded to the nearest.

    Args:
        view: the model.
        first: depth of the first layer, 0 for the bottom, 1 for the top.
        last: depth of the last layer.

    Examples:
        MEMIT's layers 4 to 8 of a 32-layer model are ``at_depth(view, 0.13, 0.26)``.
    """
    top = len(view.layers) - 1
    low, high = (min(top, max(0, round(depth * top))) for depth in (first, last))
    return tuple(range(low, max(low, high) + 1))
