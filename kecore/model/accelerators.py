"""Accelerators: what makes a pass faster without changing what it computes, found through entry points.

An accelerator is a function from a model to a context that each pass of that model runs in. Where it is of no use, as
on another device, its context does nothing. All that are installed are switched on here, and nowhere else.

Environment:
    KECORE_ACCELERATORS: names, separated by commas, of those that are switched on. Unset: all. Empty: none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeAlias, cast

from torch import nn

from kecore.api.errors import ConfigError, PluginError
from kecore.api.registry import Plugins, plugin_limits

__all__ = ["GROUP", "Accelerator", "accelerated"]

GROUP = "kecore.accelerators"
"""The entry-point group: ``name = "package.module:function"``."""

Accelerator: TypeAlias = Callable[[nn.Module], AbstractContextManager[Any]]
"""``accelerator(model)`` returns the context that one pass runs in."""


@contextmanager
def accelerated(model: nn.Module) -> Iterator[None]:
    """Let the accelerators that are switched on act inside the block.

    Raises:
        ConfigError: ``KECORE_ACCELERATORS`` names one that is not installed.
    """
    with ExitStack() as stack:
        for accelerator in _switched_on():
            stack.enter_context(accelerator(model))
        yield


@cache
def _switched_on() -> tuple[Accelerator, ...]:
    plugins = Plugins(
        entry_points(group=GROUP), noun="accelerator", check=_check, missing=ConfigError, **plugin_limits()
    )
    names = os.environ.get("KECORE_ACCELERATORS")
    if names is None:
        return tuple(plugins.all().values())
    return tuple(plugins.get(name.strip()) for name in names.split(",") if name.strip())


def _check(plugin: object, name: str, who: str) -> Accelerator:
    """Return what an entry point leads to, where it can be called.

    Raises:
        PluginError: it cannot.
    """
    if not callable(plugin):
        raise PluginError(f"{who} leads to {type(plugin).__name__}, an accelerator is a function of a model")
    return cast("Accelerator", plugin)
