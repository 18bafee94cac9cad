"""What a side module has to know of its model's present pass: which tokens are real, and what came before them."""

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
from kecore.model.hooks import first_argument, first_tensor
from kecore.model.sites import Output, Value
from kecore.model.view import Pass

Act = Callable[[Tensor, Tensor, Tensor, "Passes"], Tensor]
"""What a side module does at a linear map: given keys ``[rows, width, d_in]`` in float32, values
``[rows, width, d_out]`` as the map returned them, the mask ``[rows, width]`` of real tokens and the passes, it returns
new values of the same shape and type."""

__all__ = ["Act", "Passes", "hook_map", "hook_projection", "residual_stream"]


class Passes:
    """Follows the passes of one model.

    A text that is written token by token comes in many passes over one key-value cache. What a side module decided
    in an earlier one is looked up by that cache, so that several texts may be under way at a time. Where a cache's
    rows are put into another order between two passes (beam search), decisions do not follow.

    Args:
        model: the causal language model.

    Attributes:
        mask: ``[rows, width]``, the real tokens of the present pass; None between passes.
        follows_text: the present pass is a decoder's, whose first token has seen what the encoder read.
        text_state: what side modules decided about the present texts in earlier passes; they read and write it.
        handles: the hooks, for the caller to remove.
    """

    def __init__(self, model: nn.Module) -> None:
        self.mask: Tensor | None = None
        self.follows_text = False
        self.text_state: dict[str, Tensor] = {}
        self._states: WeakKeyDictionary[Any, dict[str, Tensor]] = WeakKeyDictionary()  # by key-value cache
        self.handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            # Also after a pass that was stopped on its way: what it saw says nothing about the next one.
            model.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = dict(kwargs)
        if args:
            arguments = {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}
        self.follows_text = _reads_in_decoder(arguments)
        self.mask = _real_tokens(arguments)
        cache = given_cache(arguments)
        self.text_state = {}
        if cache is not None:
            self.text_state = self._states.get(cache, {})

    def _after(self, _model: nn.Module, _args: Any, output: Any) -> None:
        cache = kept_cache(output)
        if cache is not None and self.text_state:
            self._states[cache] = self.text_state
        self.mask, self.text_state = None, {}

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states of a pass as ``[rows, width, d]``, and the mask ``[rows, width]`` of real tokens.

        Some architectures flatten rows and columns before their feed-forward block.
        """
        mask = self.mask
        if mask is None or mask.numel() * x.shape[-1] != x.numel():
            # The model's inner module was called on its own: every token counts as real.
            mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
            if mask.ndim == 1:
                mask = mask[None]  # [1, width]
        return x.reshape(*mask.shape, x.shape[-1]), mask.to(x.device)


def _reads_in_decoder(arguments: dict[str, Any]) -> bool:
    """Return whether the named arguments of a pass are those of an encoder-decoder."""
    return bool(arguments.keys() & {"decoder_input_ids", "decoder_inputs_embeds"})


def _real_tokens(arguments: dict[str, Any]) -> Tensor:
    """Return the mask ``[rows, width]`` of a pass's real tokens, given the named arguments of the model.

    Of an encoder-decoder, those that the decoder reads: side modules act in its layers.
    """
    prefix = "decoder_" if _reads_in_decoder(arguments) else ""
    rows = arguments.get(f"{prefix}input_ids")
    if rows is None:
        rows = arguments[f"{prefix}inputs_embeds"][..., 0]  # [rows, width]
    mask = arguments.get(f"{prefix}attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask[:, -rows.shape[1] :].bool()  # the mask covers what the cache holds as well
    return torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)


def hook_projection(model: nn.Module, path: str, act: Act) -> list[RemovableHandle]:
    """Hook a function of key and value into a linear map, and follow the model's passes.

    Args:
        model: the causal language model.
        path: module path of the linear map.
        act: what is done there.
    """
    passes = Passes(model)
    try:
        passes.handles.append(hook_map(passes, model.get_submodule(path), act))
    except BaseException:
        for handle in passes.handles:
            handle.remove()
        raise
    return passes.handles


def hook_map(passes: Passes, projection: nn.Module, act: Act) -> RemovableHandle:
    """Hook a function of key and value into a layer's block, or another map, of a model whose passes are followed."""

    def after(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        keys, mask = passes.tokens(first_argument(args, kwargs))
        value = first_tensor(output)
        new_value = act(keys.float(), value.reshape(*mask.shape, value.shape[-1]), mask, passes)
        new_value = new_value.reshape(value.shape)
        return new_value if isinstance(output, Tensor) else (new_value, *output[1:])

    return projection.register_forward_hook(after, with_kwargs=True)


def residual_stream(view: ModelView, layer: int, out: Pass) -> Tensor:
    """Return what a change of the value projection's output has to outweigh, ``[rows, width, d_model]`` in its units.

    That is the residual stream behind the layer, or where a norm follows the feed-forward block, the block's output.

    Args:
        view: the model.
        layer: index of the layer.
        out: a pass that brought its values and hidden states back.
    """
    scale = view.layers[layer].residual_scale
    if scale is None:
        return out[Value(layer)]
    return out[Output(layer)] / scale
