"""Journals: a history of edits outside of a session, which a session goes on with and writes to.

kecore's own is the ledger of the plugin ``kecore_serve``; an :class:`~kecore.Editor` takes whatever fulfils
:class:`Journal`. ``kecore edit --ledger DIR`` finds out whose a folder is through the entry-point group
``kecore.journals``: ``name = "module:function"``, where the function takes a path and returns a journal, or None where
the folder is none of its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor

from kecore.api.errors import ArtifactError, PluginError
from kecore.api.identity import Fingerprint
from kecore.api.plugins import Plugins, plugin_limits
from kecore.edit import Edit

__all__ = ["GROUP", "Journal", "Withdrawal", "common_length", "find_journal", "open_journal"]

GROUP = "kecore.journals"
"""The entry-point group."""

OpenJournal = Callable[[Path], "Journal | None"]


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """What taking edits back meant.

    Args:
        ids: the edits that were taken back.
        later: edits in effect that were planned while they were, and stay as they were planned.
        replaced: id of each edit that was planned anew, to the id of what stands in its place.
        state: the journal's state after it.
    """

    ids: tuple[str, ...]
    later: tuple[str, ...] = ()
    replaced: Mapping[str, str] = field(default_factory=dict[str, str])
    state: str = ""

    @property
    def is_exact(self) -> bool:
        """Whether all is as if the edits had never been made: no edit that stays was planned with them."""
        return not self.later


@runtime_checkable
class Journal(Protocol):
    """A history of the edits of one model that outlives sessions; see ``kecore_serve.ledger.Ledger``."""

    @property
    def model(self) -> str:
        """Reference of the model, which :func:`kecore.load_model` takes."""
        ...

    @property
    def base(self) -> Fingerprint:
        """Fingerprint of its unedited weights."""
        ...

    @property
    def state(self) -> str:
        """A digest of the edits in effect."""
        ...

    def active_ids(self) -> tuple[str, ...]:
        """Return the ids of the edits in effect, in the order in which they are put on the base."""
        ...

    def load_edit(self, id_: str) -> Edit:
        """Read an edit by its whole id."""
        ...

    def path_of(self, id_: str) -> Path:
        """Return the file of an edit."""
        ...

    def method_state(self, method: str) -> Mapping[str, Tensor]:
        """Return what a method's next edit has to know of those in effect."""
        ...

    def writing(self) -> AbstractContextManager[None]:
        """Let nobody else write inside the block."""
        ...

    def append(self, edit: Edit, *, planned_on: str | None = None) -> Any:
        """Add an edit that was planned with the edits of a state on the model."""
        ...

    def score(self, id_: str, scores: Mapping[str, Any]) -> Any:
        """Record scores of an edit."""
        ...

    def revert(self, ids: str | Iterable[str]) -> Withdrawal:
        """Take edits back by their ids; later ones stay as they were planned."""
        ...

    def take_back(
        self, ids: str | Iterable[str], open_session: Callable[[], Any], *, facts: Sequence[str] = ()
    ) -> Withdrawal:
        """Take edits back, or some facts of one edit, and plan anew what was planned with them.

        Args:
            ids: beginnings of ids.
            open_session: opens an Editor on the unedited model; called only where something has to be planned.
            facts: ids of facts, where only these are to be taken back.
        """
        ...


def find_journal(folder: str | Path) -> Journal | None:
    """Open the journal in a folder; return None where no installed plugin knows the folder for one.

    Raises:
        ArtifactError: the journal is damaged.
    """
    path = Path(folder)
    if not path.is_dir():
        return None
    for open_one in _plugins().all().values():
        journal = open_one(path)
        if journal is not None:
            return journal
    return None


def open_journal(folder: str | Path) -> Journal:
    """Open the journal in a folder.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    journal = find_journal(folder)
    if journal is None:
        raise ArtifactError(f"{folder} holds no ledger; make one with `kecore ledger init MODEL {folder}`")
    return journal


@cache
def _plugins() -> Plugins[OpenJournal]:
    return Plugins(entry_points(group=GROUP), noun="journal", check=_check, missing=PluginError, **plugin_limits())


def _check(target: object, name: str, source: str) -> OpenJournal:
    del name
    if not callable(target):
        raise PluginError(f"{source}: the entry point must lead to a function, got {target!r}")
    return cast(OpenJournal, target)


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Return how many ids two sequences have in common from their beginning."""
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length
