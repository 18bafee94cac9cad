"""Watches what a piece of code does outside its own business: output, files, connections."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

from kecore.models import cache_dir

__all__ = ["watch_side_effects"]

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CACHES = ("XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME", "TORCH_EXTENSIONS_DIR")

_watchers: list[list[str]] = []  # notes of the blocks that are watched now, the innermost last


@contextmanager
def watch_side_effects() -> Iterator[list[str]]:
    """Note what a ``with`` block writes to the terminal and to files, and what it connects to.

    Files in cache folders and compiled modules (``__pycache__``) are nobody's loss and are not noted.

    Yields:
        The list of notes, in words; what was printed is added when the block ends.
    """
    _listen()
    notes: list[str] = []
    out, err = io.StringIO(), io.StringIO()
    _watchers.append(notes)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            yield notes
    finally:
        _watchers.pop()
        for name, stream in (("stdout", out), ("stderr", err)):
            if stream.getvalue():
                notes.append(f"wrote {stream.getvalue()[:80]!r} to {name}")


@cache
def _listen() -> None:
    """Install the one audit hook of this process; Python offers no way to take it off again."""
    sys.addaudithook(_hear)


def _hear(event: str, args: tuple[Any, ...]) -> None:
    """Note an audit event for the innermost block that is watched."""
    if not _watchers:
        return
    notes = _watchers[-1]
    if event == "open":
        path, mode, flags = args
        writes = bool(set(mode or "") & set("wax+")) or bool((flags or 0) & _WRITES)
        if isinstance(path, int) or not writes:
            return
        file = Path(os.fsdecode(path)).absolute()
        if not _is_cache(file):
            notes.append(f"opened {file} for writing")
    elif event == "socket.connect":
        notes.append(f"asked the network: {event} {args[-1]}")
    elif event == "socket.getaddrinfo":
        notes.append(f"asked the network: {event} {args[0]}")


def _is_cache(file: Path) -> bool:
    """Return whether nobody misses or minds the file: the null device, compiled modules, folders of caches."""
    if file == Path(os.devnull) or "__pycache__" in file.parts:
        return True
    folders = [cache_dir(), Path.home() / ".cache"]
    folders += [Path(os.environ[name]) for name in _CACHES if os.environ.get(name)]
    return any(file.is_relative_to(folder) for folder in folders)
