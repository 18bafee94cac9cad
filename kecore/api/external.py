"""Methods that are used from a file, without being installed: ``./mine.py:Mine``."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from kecore.api.errors import PluginError
from kecore.api.method import EditMethod
from kecore.api.registry import check_contract

__all__ = ["MethodFile", "is_method_file", "load_method", "method_file"]


@dataclass(frozen=True, slots=True)
class MethodFile:
    """The file that a method was loaded from, as its edits keep it.

    Args:
        file: the file's name.
        sha256: digest of its content.
        name: the class.
    """

    file: str
    sha256: str
    name: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


_LOADED: dict[type[EditMethod], MethodFile] = {}


def is_method_file(text: str) -> bool:
    """Return whether a text names a file and not an installed method: ``mine.py`` or ``mine.py:Mine``."""
    return _split(text)[0].endswith(".py")


def load_method(text: str) -> type[EditMethod]:
    """Load the class that a text such as ``./mine.py:Mine`` names; the same content is imported once.

    Modules beside the file can be imported by it.

    Raises:
        PluginError: there is no such file or class, it cannot be imported, or it breaks the contract of a method.
    """
    path, name = _split(text)
    file = Path(path).expanduser()
    try:
        source = file.read_bytes()
    except OSError as error:
        raise PluginError(
            f"method file {file} cannot be read: {error.strerror or error}; `kecore new-method NAME` writes one to "
            "start from"
        ) from error
    digest = hashlib.sha256(source).hexdigest()
    module_name = f"kecore_method_{file.stem}_{digest[:12]}"
    module = sys.modules.get(module_name) or _import(file, module_name)
    target = _find_class(module, file, name)
    method = check_contract(target, getattr(target, "name", ""), f"method '{text}'")
    _LOADED[method] = MethodFile(file.name, digest, method.__name__)
    return method


def method_file(method: type[Any]) -> MethodFile | None:
    """Return the file that a method was loaded from; None for one that is installed or was given as a class."""
    return _LOADED.get(method)


def _split(text: str) -> tuple[str, str]:
    """Split a text into file and class, which may be missing; a drive's colon stays with the file."""
    path, colon, name = text.strip().rpartition(":")
    return (path, name) if colon and path.endswith(".py") else (text.strip(), "")


def _import(file: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise PluginError(f"method file {file} is no Python module")
    module = importlib.util.module_from_spec(spec)
    folder = str(file.resolve().parent)
    sys.modules[name] = module  # dataclasses and pydantic look their module up
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a stranger's module may raise anything at import
        del sys.modules[name]
        raise PluginError(f"method file {file} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    return module


def _find_class(module: ModuleType, file: Path, name: str) -> object:
    """Return what a file holds under a name; without a name, its only class with a ``plan``.

    Raises:
        PluginError: there is nothing of that name, or none or several such classes.
    """
    own = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
    methods = [value.__name__ for value in own if isinstance(value, type) and hasattr(value, "plan")]
    if name:
        if not hasattr(module, name):
            near = get_close_matches(name, methods, n=1)
            hint = f"did you mean {file}:{near[0]}? " if near else ""
            raise PluginError(
                f"{file} has no class '{name}'; {hint}classes with a plan: {', '.join(methods) or 'none'}"
            )
        return getattr(module, name)
    if len(methods) != 1:
        listed = ", ".join(f"{file}:{method}" for method in methods) or "none"
        raise PluginError(f"{file} has {len(methods)} classes with a plan; name one as FILE:CLASS: {listed}")
    return getattr(module, methods[0])
