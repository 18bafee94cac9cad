"""The name of a model's key-value cache: ``cache`` since transformers 5.24, ``past_key_values`` before."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

__all__ = ["cache_keyword", "given_cache", "join_caches", "kept_cache", "shift_cache"]

_NEW, _OLD = "cache", "past_key_values"


def cache_keyword(model: nn.Module) -> str:
    """Return the name that the model's ``forward`` has for the cache that it is given."""
    return _keyword(type(model).forward)


@lru_cache(maxsize=64)
def _keyword(forward: Callable[..., Any]) -> str:
    return _NEW if _NEW in inspect.signature(forward).parameters else _OLD


def given_cache(named: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a pass, by either name; None if there is none."""
    cache = named.get(_NEW)
    return named.get(_OLD) if cache is None else cache


def kept_cache(output: Any) -> Any:
    """Return the cache that a pass returned; None if it keeps none."""
    name = _NEW if hasattr(output, _NEW) else _OLD  # asking the new outputs for the old name prints a warning
    return getattr(output, name, None)


def _grows(cache: Any) -> bool:
    """Return whether every layer of a cache keeps keys and values of all tokens, ``[rows, heads, width, d]``."""
    from transformers.cache_utils import DynamicLayer

    layers = getattr(cache, "layers", None) or []
    # Exactly this class: those derived from it keep a window, or more than keys and values.
    return bool(layers) and all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers)


def shift_cache(cache: Any, columns: int) -> None:
    """Put empty columns before all others of a cache, or with a negative number take the first columns away.

    Args:
        cache: one that :func:`join_caches` takes.
        columns: how many.
    """
    for layer in cache.layers:
        layer.keys = pad(layer.keys, (0, 0, columns, 0))  # [rows, heads, columns + width, d]
        layer.values = pad(layer.values, (0, 0, columns, 0))


def join_caches(first: Any, second: Any) -> bool:
    """Put the rows of a second cache below those of the first; both end in one column then.

    The narrower one gets empty columns before its own, which the attention mask has to leave out.

    Args:
        first: the cache that takes them.
        second: a cache of the same model; it is spent afterwards.

    Returns:
        Whether it was done: not with caches that keep a window or a state instead of every token.
    """
    if not (_grows(first) and _grows(second)):
        return False
    difference = second.get_seq_length() - first.get_seq_length()
    shift_cache(first if difference > 0 else second, abs(difference))
    for layer, other in zip(first.layers, second.layers, strict=True):
        layer.keys = torch.cat([layer.keys, other.keys])  # [rows + other rows, heads, width, d]
        layer.values = torch.cat([layer.values, other.values])
    return True
