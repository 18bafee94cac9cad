"""The name of a model's key-value cache: ``cache`` since transformers 5.24, ``past_key_values`` before."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from torch import nn

__all__ = ["cache_keyword", "given_cache", "kept_cache"]

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
