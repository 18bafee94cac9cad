"""The pages that explain kecore's errors, which travel with the package, and where they stand on the web."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from kecore.api import errors
from kecore.api.errors import ConfigError, StorageError

__all__ = ["error_page", "web_address"]

_URL_LABEL = "documentation"
"""The label of the project's metadata (``[project.urls]``) whose address the pages stand under."""


def error_page(name: str) -> str:
    """Return the page of an error class, as Markdown.

    Args:
        name: the class; letter case does not matter.

    Raises:
        ConfigError: kecore has no such error; suggests near names.
        StorageError: the page is not where it was installed.
    """
    known = {error.casefold(): error for error in errors.__all__}
    key = name.strip().casefold()
    if key not in known:
        near = [known[match] for match in get_close_matches(key, known, n=3)]
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(f"kecore has no error '{name}'; {hint}known: {', '.join(errors.__all__)}")
    path = _folder() / f"{known[key]}.md"
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}; install kecore again") from error


def web_address(name: str) -> str:
    """Return where the page of an error class stands on the web; empty where the project's metadata name no place."""
    try:
        urls = metadata("kecore").get_all("Project-URL") or []
    except PackageNotFoundError:  # run from a folder of sources
        return ""
    for entry in urls:
        label, _, address = entry.partition(",")
        if label.strip().casefold() == _URL_LABEL:
            return f"{address.strip().rstrip('/')}/errors/{name}.html"
    return ""


def _folder() -> Path:
    """Return where the pages stand: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_errors"
    return installed if installed.is_dir() else package.parent / "docs" / "errors"
