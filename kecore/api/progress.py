"""Progress of long work: how far it is, and how much time its stages took."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

__all__ = ["Progress", "ShowStage", "Stages", "quiet_logger", "show_nothing", "silent"]

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``; ``total`` 0 means unknown."""


def silent(stage: str, done: int, total: int) -> None:
    """Show nothing; a :data:`Progress`."""


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
