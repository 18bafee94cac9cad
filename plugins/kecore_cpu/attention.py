"""Attention on a CPU, as replays of edited rows, scores of prompts and key statistics have it.

torch's fused kernel takes no notice of which keys a causal query cannot see, and before it transformers copies the keys
and values of grouped heads once for each head of the group. Here the heads of a group are rows of one product, and of
long texts a block of queries meets only the keys up to its end. On two cores of an AMD EPYC (Zen 5), with 140 rows of 6
queries over 30 keys, 9 heads in 3 groups, a pass forward is 3.1 times as fast in float32 and 2.7 times in bfloat16, one
forward and backward 1.5 and 18 times; over 4 rows of 512 tokens a pass forward is 1.4 and 2.5 times as fast
(``benchmarks/bench_attention.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["attention", "by_groups"]

_NAME = "kecore"
_SHORT = 128  # queries in a row; with more, all scores at once are slower than the fused kernel in float32
_BLOCK = 48  # queries of a longer text at a time


@contextmanager
def by_groups(model: nn.Module) -> Iterator[None]:
    """Let a model that asks transformers for ``sdpa`` have :func:`attention` inside the block.

    Args:
        model: others than those of transformers, those with attention of their own, and those that are not on a CPU
            are left alone.
    """
    config: Any = getattr(model, "config", None)
    chosen: list[Any] = []
    replaceable = config is not None and getattr(model, "_supports_attention_backend", False)
    if replaceable and next(model.parameters()).device.type == "cpu":
        # A model of several modalities has a configuration for each of its towers.
        sub_configs = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]
        for candidate in (config, *sub_configs):
            if getattr(candidate, "_attn_implementation", None) == "sdpa":
                chosen.append(candidate)
    if chosen:
        _register()
    try:
        for chosen_config in chosen:
            chosen_config._attn_implementation_internal = _NAME
        yield
    finally:
        for chosen_config in chosen:
            chosen_config._attn_implementation_internal = "sdpa"


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Return softmax(scaling Q Kᵀ + mask) V, in transformers' interface.

    Args:
        module: the attention module.
        query: ``[rows, heads, t, d]``.
        key: ``[rows, groups, s, d]``; each serves ``heads / groups`` heads.
        value: ``[rows, groups, s, d_v]``.
        attention_mask: ``[rows or 1, heads or 1, t, s]``, true where a query sees a key, or added to the scores; None
            for all keys, or for the causal mask where ``is_causal``.
        dropout: of the weights.
        scaling: of the scores; by default ``d ** -0.5``.
        is_causal: that no query sees later keys, where there is no mask; by default what the module says.
        more: whatever else an architecture asks for; where this function does not know it, transformers' own acts.

    Returns:
        ``[rows, t, heads, d_v]``, and None in the place of the weights.
    """
    rows, heads, t, d = query.shape
    s = key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    by_blocks = t > _SHORT and attention_mask is None and causal and t == s and not torch.is_grad_enabled()
    known = not dropout and rows == len(key) and all(more.get(name) is None for name in _UNKNOWN)
    if not known or (t > _SHORT and not by_blocks):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **more)  # pyright: ignore[reportReturnType]
    scaled = query * (d**-0.5 if scaling is None else scaling)
    if by_blocks:
        out = query.new_empty(rows, t, heads, value.shape[-1])
        for begin in range(0, t, _BLOCK):
            end = min(t, begin + _BLOCK)
            scores = _scores(scaled[:, :, begin:end], key[:, :, :end])
            later = torch.ones(end - begin, end - begin, dtype=torch.bool, device=query.device).triu(1)
            scores[..., begin:].masked_fill_(later, torch.finfo(scores.dtype).min)
            out[:, begin:end] = _weighted(scores, value[:, :, :end])
        return out, None
    if attention_mask is None and causal and t > 1:
        # As transformers has it: the first query sees the first key alone, also where there are more keys.
        attention_mask = torch.ones(t, s, dtype=torch.bool, device=query.device).tril()[None, None]
    scores = _scores(scaled, key)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        # Not minus infinity: at a padding token that sees nothing it would make NaN.
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    return _weighted(scores, value).contiguous(), None


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Return scores ``[rows, heads, t, s]``; the heads of a group are rows of one product."""
    rows, heads, t, d = query.shape
    return (query.reshape(rows, key.shape[1], -1, d) @ key.transpose(2, 3)).view(rows, heads, t, -1)


def _weighted(scores: Tensor, value: Tensor) -> Tensor:
    """Return softmax(scores) V, ``[rows, t, heads, d_v]``."""
    rows, heads, t, s = scores.shape
    weights = scores.softmax(-1).view(rows, value.shape[1], -1, s)
    return (weights @ value).view(rows, heads, t, -1).transpose(1, 2)


_UNKNOWN = ("position_bias", "softcap", "s_aux", "cache")
"""What changes the scores or the keys in ways that :func:`attention` does not know."""
