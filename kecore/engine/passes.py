"""What a side module has to know of the pass that its model is in: which tokens are real, and what came before them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kecore.model import ModelView
from kecore.model.caches import given_cache, kept_cache
from kecore.model.hooks import first_tensor
from kecore.model.view import Pass

Act = Callable[[Tensor, Tensor, Tensor, "Passes"], Tensor]
"""Given keys ``[rows, width, d_in]`` in float32, values ``[rows, width, d_out]`` as the map returned them, the mask of
real tokens and the passes, returns new values of the same type."""

__all__ = ["Act", "Passes", "at_projection", "beside", "stream"]


class Passes:
    """Follows the passes of one model.

    A text that is written token by token comes in many passes over one key-value cache. What a side module decided
    in an earlier one is found again by that cache, so that several texts may be under way at a time. Where a cache's
    rows are put into another order between two passes (beam search), decisions do not follow.

    Args:
        model: the causal language model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.mask: Tensor | None = None
        self.memory: dict[str, Tensor] = {}
        self._kept: WeakKeyDictionary[Any, dict[str, Tensor]] = WeakKeyDictionary()
        self.handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            # Also after a pass that was stopped on its way: what it saw says nothing about the next one.
            model.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {**(inspect.signature(model.forward).bind_partial(*args).arguments if args else {}), **kwargs}
        ids = named.get("input_ids")
        rows = ids if ids is not None else named["inputs_embeds"][..., 0]
        mask = named.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self.mask = mask[:, -rows.shape[1] :].bool()  # the mask covers what the cache holds as well
        else:
            self.mask = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        cache = given_cache(named)
        self.memory = self._kept.get(cache, {}) if cache is not None else {}

    def _after(self, _model: nn.Module, _args: Any, output: Any) -> None:
        cache = kept_cache(output)
        if cache is not None and self.memory:
            self._kept[cache] = self.memory
        self.mask, self.memory = None, {}

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """States ``[rows, width, d]`` of a pass and the mask ``[rows, width]`` of real tokens.

        Some architectures flatten rows and columns before their feed-forward block.
        """
        mask = self.mask
        if mask is None or mask.numel() * x.shape[-1] != x.numel():  # the model's inner module was called on its own
            mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
            mask = mask if mask.ndim == 2 else mask[None]
        return x.reshape(*mask.shape, x.shape[-1]), mask.to(x.device)


def at_projection(model: nn.Module, place: str, act: Act) -> list[RemovableHandle]:
    """Hook a function of key and value into a linear map, and follow the model's passes.

    Args:
        model: the causal language model.
        place: path of the linear map.
        act: what is done there.
    """
    passes = Passes(model)
    try:
        passes.handles.append(beside(passes, model.get_submodule(place), act))
    except BaseException:
        for handle in passes.handles:
            handle.remove()
        raise
    return passes.handles


def beside(passes: Passes, projection: nn.Module, act: Act) -> RemovableHandle:
    """Hook a function of key and value into a linear map of a model whose passes are followed."""

    def after(_module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        keys, mask = passes.tokens(args[0])
        value = first_tensor(output)
        found = act(keys.float(), value.reshape(*mask.shape, value.shape[-1]), mask, passes)
        return found.reshape(value.shape)

    return projection.register_forward_hook(after)


def stream(view: ModelView, layer: int, out: Pass) -> Tensor:
    """What a change of the value projection's output has to outweigh, ``[rows, width, d_model]`` in its units.

    That is the residual stream behind the layer, or where a norm follows the feed-forward block, the block's output.

    Args:
        view: the model.
        layer: index of the layer.
        out: a pass that brought its values and hidden states back.
    """
    scale = view.layers[layer].residual_scale
    return out.values[layer] if scale is None else out.hidden[layer] / scale
