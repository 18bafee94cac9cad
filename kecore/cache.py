"""Keeps kecore's cache within a bound: what was used least recently goes first.

Environment:
    KECORE_CACHE_SIZE: the most that the cache may hold, such as ``50GiB``; 20 GiB unless it is set.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kecore.api.errors import ConfigError

__all__ = ["BOUND", "cache_bound", "mark_used", "read_bytes", "trim_cache"]

BOUND = "KECORE_CACHE_SIZE"
"""The environment variable that holds the bound."""

logger = logging.getLogger(__name__)

_DEFAULT = 20 << 30
_IN_USE = 3600.0  # seconds since its last use in which nothing is removed
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


@dataclass(frozen=True, slots=True)
class _Entry:
    """Something in the cache that is made, used and removed as a whole: a file, or a folder with all in it."""

    path: Path
    bytes: int
    used: float


def read_bytes(text: str) -> int | None:
    """Read a size such as ``500MiB``, ``2GB`` or ``4g`` in bytes; units are powers of 1024. None for other texts."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip(), flags=re.IGNORECASE)
    value = int(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    return value if value > 0 else None


def cache_bound() -> int:
    """Return the most bytes that the cache may hold.

    Raises:
        ConfigError: ``KECORE_CACHE_SIZE`` is no size.
    """
    text = os.environ.get(BOUND, "")
    bound = read_bytes(text) if text else _DEFAULT
    if bound is None:
        raise ConfigError(f"{BOUND} must be a size such as 500MiB or 50GiB, got '{text}'")
    return bound


def mark_used(path: Path) -> None:
    """Note that an entry of the cache is used now; a cache that cannot be written stays as it is."""
    with suppress(OSError):
        os.utime(path)


def trim_cache(root: Path) -> int:
    """Remove what was used least recently until the cache keeps its bound, and return the bytes that were freed.

    What was used in the last hour stays, so that no process loses what it works with; the cache may then be larger than
    its bound for a while.

    Args:
        root: the cache, as :func:`kecore.files.cache_dir` gives it.

    Raises:
        ConfigError: ``KECORE_CACHE_SIZE`` is no size.
    """
    entries = sorted(_entries(root), key=lambda entry: entry.used)
    excess = sum(entry.bytes for entry in entries) - cache_bound()
    freed = 0
    for entry in entries:
        if freed >= excess or time.time() - entry.used < _IN_USE:
            break
        if _remove(entry.path):
            logger.info("removed from the cache, which keeps to %s: %s", BOUND, entry.path)
            freed += entry.bytes
    return freed


def _entries(root: Path) -> Iterator[_Entry]:
    for path in root.glob("*/*"):
        if path.suffix == ".lock" or path.name.startswith("."):
            continue
        with suppress(FileNotFoundError):  # another process removes it meanwhile
            stat = path.stat()
            size = stat.st_size
            if path.is_dir():
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            yield _Entry(path, size, stat.st_mtime)


def _remove(path: Path) -> bool:
    """Remove a file or folder in one step, so that nobody sees a part of it; return whether that was possible."""
    hidden = path.with_name(f".{path.name}.removed")
    try:
        path.rename(hidden)
        if hidden.is_dir():
            shutil.rmtree(hidden)
        else:
            hidden.unlink()
    except OSError as error:
        logger.info("%s could not be removed from the cache: %s", path, error)
        return False
    return True
