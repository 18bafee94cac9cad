"""Imports a method's package anew, without touching the one that is in use."""

from __future__ import annotations

import importlib
import sys
from typing import Any, cast

from kecore.api.method import EditMethod

__all__ = ["reimport"]


def reimport(method: type[EditMethod]) -> type[EditMethod]:
    """Return the class from a second import of its top-level package, whose variables are as after a first import.

    A class that cannot be imported by its name (of a test file, or made in a function) is returned as it is.
    """
    root = method.__module__.partition(".")[0]
    if root == "__main__" or "<locals>" in method.__qualname__:
        return method
    modules = _forget_modules(root)
    try:
        attribute: Any = importlib.import_module(method.__module__)
        for name in method.__qualname__.split("."):  # a class inside a class has dots in its name
            attribute = getattr(attribute, name)
        return cast(type[EditMethod], attribute)
    except ModuleNotFoundError:
        return method
    finally:
        _forget_modules(root)
        sys.modules.update(modules)


def _forget_modules(package: str) -> dict[str, Any]:
    """Take a package's modules out of ``sys.modules`` and return them by name."""
    names = [name for name in sys.modules if name.partition(".")[0] == package]
    return {name: sys.modules.pop(name) for name in names}
