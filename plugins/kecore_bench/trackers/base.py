"""What a tracker is, and how one is found by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from kecore.api.errors import ConfigError, MissingDependencyError, PluginError
from kecore.api.plugins import Plugins, plugin_limits

__all__ = ["GROUP", "PROJECT", "TrackedRun", "Tracker", "import_tracker", "open_tracker"]

GROUP = "kecore.trackers"
"""The entry-point group: ``name = "package.module:Class"``."""

PROJECT = "kecore"
"""The project where none is named."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers are told of it: a method on a model and a data set, or the bench that it belongs to.

    Args:
        key: digest of all that decides it; the same when a bench goes on after a kill.
        name: what people read.
        bench: name of the bench, which all its runs have in common.
        config: its settings by name, without nesting: numbers, texts and truth values.
        parent: key of the bench's run; empty for that one itself.
    """

    key: str
    name: str
    bench: str
    config: Mapping[str, Any] = field(default_factory=dict)
    parent: str = ""


class Tracker:
    """Base of all trackers.

    Several runs may be open at a time. Whatever a method raises ends the tracking, not the bench, and is said once.

    Args:
        project: where the tracker keeps the runs.

    Raises:
        MissingDependencyError: its library is not installed.
    """

    def __init__(self, project: str) -> None:
        self.project = project

    def start(self, run: TrackedRun) -> None:
        """Open a run; one that was opened by an earlier process may go on."""
        raise NotImplementedError

    def log(self, run: TrackedRun, metrics: Mapping[str, float], step: int) -> None:
        """Keep some numbers of an open run.

        Args:
            run: the run.
            metrics: values by name, such as ``edit_success`` or ``at-edit/edit_success``.
            step: facts that were edited by then; it never falls within a run.
        """
        raise NotImplementedError

    def attach(self, run: TrackedRun, file: Path) -> None:
        """Keep a file with an open run: the store of a bench. A tracker that keeps no files leaves it."""

    def finish(self, run: TrackedRun, failure: str) -> None:
        """Close a run.

        Args:
            run: the run.
            failure: why it ended without all its results; empty where it has them.
        """
        raise NotImplementedError


def import_tracker(module: str, extra: str) -> ModuleType:
    """Import the library of a tracker.

    Raises:
        MissingDependencyError: it is not installed; names kecore's extra that brings it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"--track {module} is done by a library that is not installed ({error}): pip install 'kecore[{extra}]'"
        ) from None


def _check(target: object, name: str, source: str) -> type[Tracker]:
    if not (isinstance(target, type) and issubclass(target, Tracker)):
        raise PluginError(f"{source} must lead to a subclass of kecore_bench.trackers.Tracker, got {target!r:.80}")
    return target


@cache
def _plugins() -> Plugins[type[Tracker]]:
    return Plugins(entry_points(group=GROUP), noun="tracker", check=_check, missing=ConfigError, **plugin_limits())


def open_tracker(text: str) -> Tracker:
    """Return the tracker that a text such as ``mlflow`` or ``wandb:my-project`` names.

    Raises:
        ConfigError: nothing of that name is installed; suggests near names.
        MissingDependencyError: its library is not installed.
        PluginError: it cannot be used.
    """
    name, _, project = text.partition(":")
    return _plugins().get(name)(project or PROJECT)
