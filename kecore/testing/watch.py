"""Watching what a piece of code does outside its own business: output, files, connections."""

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

_seen: list[list[str]] = []


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
    _seen.append(notes)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            yield notes
    finally:
        _seen.pop()
        notes += [
            f"wrote {text.getvalue()[:80]!r} to {name}"
            for name, text in (("stdout", out), ("stderr", err))
            if text.getvalue()
        ]


@cache
def _listen() -> None:
    """Install the one audit hook of this process; Python offers no way to take it off again."""
    sys.addaudithook(_hear)


def _hear(event: str, args: tuple[Any, ...]) -> None:
    if not _seen:
        return
    if event == "open":
        path, mode, flags = args
        if isinstance(path, int) or not (set(mode or "") & set("wax+") or (flags or 0) & _WRITES):
            return
        place = Path(os.fsdecode(path)).absolute()
        if not _is_cache(place):
            _seen[-1].append(f"opened {place} for writing")
    elif event in ("socket.connect", "socket.getaddrinfo"):
        _seen[-1].append(f"asked the network: {event} {args[-1] if event == 'socket.connect' else args[0]}")


def _is_cache(place: Path) -> bool:
    folders = [cache_dir(), Path.home() / ".cache", *(Path(os.environ[n]) for n in _CACHES if os.environ.get(n))]
    return place == Path(os.devnull) or "__pycache__" in place.parts or any(place.is_relative_to(f) for f in folders)
