"""Which layers a method edits when nobody names any: by depth, not by the model's name. And what maps are in them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kecore.model import LinearView, ModelView

__all__ = ["at_depth", "linear_maps"]


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


def linear_maps(view: ModelView, layers: Sequence[int]) -> dict[str, LinearView]:
    """Return every linear map of some decoder layers, by module path."""
    from transformers.pytorch_utils import Conv1D

    parameter_names = {id(parameter): name for name, parameter in view.model.named_parameters()}
    maps: dict[str, LinearView] = {}
    for index in layers:
        layer = view.layers[index]
        for name, module in layer.module.named_modules():
            if isinstance(module, nn.Linear | Conv1D) and id(module.weight) in parameter_names:
                weight_name = parameter_names[id(module.weight)]
                maps[f"{layer.name}.{name}"] = LinearView(module, weight_name, isinstance(module, Conv1D))
    return maps
