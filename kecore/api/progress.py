"""Progress of long work: how far it is, and how much time its stages took."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

__all__ = [
    "STAGES",
    "Progress",
    "ProgressBar",
    "ShowStage",
    "Stages",
    "choose_progress",
    "log_stage",
    "quiet_logger",
    "show_nothing",
    "silent",
]

STAGES = "kecore.stages"
"""The logger that says, at the level INFO, which stage of a session begins and how long it took."""

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``; ``total`` 0 means unknown."""


def silent(stage: str, done: int, total: int) -> None:
    """Show nothing; a :data:`Progress`."""


class ProgressBar:
    """Shows the running stage as a bar, in a terminal or a notebook; a :data:`Progress`.

    A bar appears for stages that take longer than a moment, and goes when its stage ends.

    Args:
        delay: seconds after which a bar appears; one whose length is not known appears at once.

    Examples:
        >>> editor = Editor(model, tokenizer, progress=ProgressBar())                     # doctest: +SKIP
    """

    def __init__(self, delay: float = 0.5) -> None:
        self.delay = delay
        self._stage = ""
        self._bar: Any = None  # of tqdm

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Move the bar of a stage, which takes the place of the bar of another stage."""
        bar = self._bar
        if bar is None or stage != self._stage or done < bar.n:
            self.close()
            bar = self._bar = self._open(stage, total)
        bar.update(done - bar.n)
        if total and done >= total:
            self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _open(self, stage: str, total: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a notebook without widgets gets a bar of text, and needs no advice
            from tqdm.auto import tqdm
        self._stage = stage
        if total:
            return tqdm(total=total, desc=stage, delay=self.delay, leave=False, file=sys.stderr)
        return tqdm(desc=stage, bar_format="{desc} ... {elapsed}", leave=False, file=sys.stderr)


def choose_progress(progress: Progress | Literal["auto"] | None) -> Progress:
    """Return what shows progress: a bar for ``"auto"`` where a person watches, nothing for None."""
    if progress == "auto":
        return ProgressBar() if _is_watched() else silent
    return silent if progress is None else progress


def _is_watched() -> bool:
    """Return whether stderr is a terminal, or the program runs in a notebook."""
    if sys.stderr is not None and sys.stderr.isatty():
        return True
    shell = sys.modules.get("IPython")  # a notebook has imported it
    return shell is not None and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell"


@contextmanager
def log_stage(doing: str) -> Iterator[None]:
    """Say in the log that a stage begins, and how long it took.

    Args:
        doing: what is done, in the present participle: ``"editing 1 fact with memit"``.
    """
    logger = logging.getLogger(STAGES)
    logger.info("%s", doing)
    begin = time.perf_counter()
    yield
    logger.info("done %s in %.1f s", doing, time.perf_counter() - begin)


ShowStage = Callable[[str, str], AbstractContextManager[None]]
"""Called as ``with show(name, doing):`` around a stage; ``doing`` says what is done: ``"attaching 2 edits"``."""


@contextmanager
def show_nothing(name: str, doing: str) -> Iterator[None]:
    """Run a stage without showing it; a :data:`ShowStage`."""
    yield


@contextmanager
def quiet_logger(name: str) -> Iterator[None]:
    """Keep a library's remarks below an error off the terminal; its lines would run through those of kecore.

    Args:
        name: the logger's name, as a rule the library's.
    """
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class Stages:
    """Wall seconds by stage name; times of the same name add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time of a ``with`` block under ``name``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
