"""Finds the editing methods that are installed, and checks them against the contract of :mod:`kecore.api.method`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from kecore.api.errors import MethodNotFoundError
from kecore.api.method import METHOD_API, EditMethod
from kecore.api.plugins import PluginInfo, Plugins, Rule, check_class, plugin_limits, subclass_rule
from kecore.api.types import Capabilities, EditKind

__all__ = ["GROUP", "MethodInfo", "Registry", "check_contract", "default_registry"]

GROUP = "kecore.methods"
"""The entry-point group: ``name = "package.module:Class"``."""


@dataclass(frozen=True, slots=True)
class MethodInfo(PluginInfo):
    """What is known of one offered method, beside the fields of :class:`~kecore.api.plugins.PluginInfo`.

    Args:
        capabilities: None where the method cannot be used.
        reference: the paper; empty where the method cannot be used.
        origin: ``"file:line"`` of the class; empty where it is not known.
    """

    capabilities: Capabilities | None = None
    reference: str = ""
    origin: str = ""

    @property
    def kind(self) -> EditKind | None:
        """What the method's edits change."""
        return self.capabilities.kind if self.capabilities else None

    def to_json(self) -> dict[str, Any]:
        """Return the fields and ``kind`` as JSON values."""
        return {**asdict(self), "kind": self.kind}


class Registry(Plugins[type[EditMethod]]):
    """The editing methods that a set of entry points of the group :data:`GROUP` offers.

    A name that nothing offers raises MethodNotFoundError. What a line such as ``"alphaedit + blue + nas"`` means
    is read by :class:`kecore.api.line.MethodLine`.

    Args:
        points: the entry points.
        limits: ``only`` and ``strict`` of :class:`~kecore.api.plugins.Plugins`.
    """

    def __init__(self, points: Iterable[EntryPoint], **limits: Any) -> None:
        super().__init__(points, noun="method", check=check_contract, missing=MethodNotFoundError, **limits)

    def describe(self) -> list[MethodInfo]:
        """Return what is known of every offer, usable or not, sorted by name; this imports all of them.

        A failure is warned of once and stands in :attr:`MethodInfo.error`.
        """
        described: list[MethodInfo] = []
        for info, method in self._described():
            values = asdict(info)
            if method is not None:
                values |= {"capabilities": method.capabilities, "reference": method.reference}
                values["origin"] = _origin(method)
            described.append(MethodInfo(**values))
        return described


@cache
def default_registry() -> Registry:
    """Return the registry of what is installed, read once per process with the environment's limits."""
    return Registry(entry_points(group=GROUP), **plugin_limits())


def check_contract(target: object, name: str, source: str = "") -> type[EditMethod]:
    """Check a class against the contract of :class:`~kecore.api.method.EditMethod`.

    Args:
        target: what the entry point leads to.
        name: the entry point's name.
        source: how messages name the method; by default by ``name``.

    Raises:
        IncompatiblePluginError: the class was written for another :data:`~kecore.api.method.METHOD_API`.
        PluginError: names the first attribute that is not as the contract asks.
    """
    from kecore.api.config import MethodConfig  # with pydantic, a third of the time to import kecore

    rules = {
        "Config": subclass_rule(MethodConfig),
        "capabilities": Rule("a Capabilities object", lambda value: isinstance(value, Capabilities)),
        "plan": Rule("a function plan(self, view, batch, context)", callable),
    }
    source = source or f"method '{name}'"
    return check_class(target, name, source, contract="METHOD_API", version=METHOD_API, rules=rules)


def _origin(method: type) -> str:
    """Return ``"file:line"`` of a class; empty where there is no source: compiled, or typed into an interpreter."""
    try:
        return f"{inspect.getsourcefile(method)}:{inspect.getsourcelines(method)[1]}"
    except (OSError, TypeError):
        return ""
