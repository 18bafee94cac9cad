"""A method's package imported anew, beside the one that is in use."""

from __future__ import annotations

import importlib
import sys
from typing import Any, cast

from kecore.api.method import EditMethod

__all__ = ["reimport"]


def reimport(method: type[EditMethod]) -> type[EditMethod]:
    """The class from a second import of its top-level package, whose variables are as after any first import.

    A class that cannot be imported by its name (of a test file, or made in a function) is returned as it is.
    """
    root = method.__module__.partition(".")[0]
    if root == "__main__" or "<locals>" in method.__qualname__:
        return method
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == root}
    for name in before:
        del sys.modules[name]
    try:
        found: Any = importlib.import_module(method.__module__)
        for part in method.__qualname__.split("."):
            found = getattr(found, part)
        return cast(type[EditMethod], found)
    except ModuleNotFoundError:
        return method
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == root]:
            del sys.modules[name]
        sys.modules.update(before)
