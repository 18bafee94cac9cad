"""A model whose edits are those of a ledger, and change while it is served."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from kecore.api.errors import ConfigError
from kecore.api.types import EditRequest
from kecore.edit import Edit, load_edit
from kecore.editor import Editor
from kecore.model import ModelView
from kecore.text import Encoder
from kecore_serve.ledger import Ledger, Withdrawal
from kecore_serve.records import Entry, digest_of_state

__all__ = ["LiveModel", "ServedLedger", "Snapshot"]

_AUTHOR = "kecore serve"
Check: TypeAlias = Callable[[Path, str | None], None]
"""Is given an edit file and its signature, and raises where it is not trusted."""


class ServedLedger(Ledger):
    """A ledger that writes down who appended the edits of a session, and with what words.

    Attributes:
        note: goes with the edits that are appended without one.
    """

    note = ""

    def append(self, edit: Edit, *, author: str | None = _AUTHOR, note: str = "", **options: Any) -> Entry:
        """Add an edit; see :meth:`Ledger.append`."""
        return super().append(edit, author=author, note=note or self.note, **options)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is on the model.

    Args:
        state: the ledger's name of it.
        active: ids of the edits, in the order in which they were put on.
    """

    state: str
    active: tuple[str, ...]


class LiveModel:
    """Keeps the edits on a model those in effect in a ledger.

    All that changes the model is called by the one thread that runs it; what only reads may be called by any.
    The ledger comes first: what it does not have is not on the model, and where the model cannot follow, the ledger
    takes its step back.

    Args:
        editor: a session on the unedited model.
        ledger: the ledger, whose base this is; the session follows it.
        check: is given each edit file that somebody sends, and its signature where there is one; raises where it is
            not trusted.

    Raises:
        ArtifactMismatchError: the ledger is of another base.
    """

    def __init__(self, editor: Editor, ledger: ServedLedger, check: Check | None = None) -> None:
        self.editor, self.ledger = editor, ledger
        self._check = check
        editor.follow(ledger)
        self.now = self._snapshot()

    @property
    def view(self) -> ModelView:
        """The model."""
        return self.editor.view

    @property
    def encoder(self) -> Encoder:
        """Its tokenizer."""
        return self.editor.encoder

    @property
    def state(self) -> str:
        """The state of the edits that are on the model."""
        return self.now.state

    @property
    def tags(self) -> dict[str, str]:
        """Tags of the ledger and their states."""
        return self.ledger.tags

    def entries(self) -> tuple[Entry, ...]:
        """Return all edits that were ever made, oldest first."""
        return self.ledger.entries()

    def find(self, beginning: str) -> Entry:
        """Return the edit whose id begins so.

        Raises:
            ArtifactError: there is none, or more than one.
        """
        return self.ledger.find(beginning)

    def is_behind(self) -> bool:
        """Return whether another process has changed the ledger."""
        return self.ledger.state != self.now.state

    def read(self, path: Path, signature: str | None = None) -> Edit:
        """Read an edit file that somebody sent, and check whether it is trusted; any thread may do so.

        Raises:
            ArtifactError: it is no edit, damaged, or not trusted.
        """
        if self._check is not None:
            self._check(path, signature)
        return load_edit(path)

    def edit(
        self,
        requests: Sequence[EditRequest],
        method: str,
        *,
        preset: str | None = None,
        config: Mapping[str, Any] | None = None,
        note: str = "",
    ) -> Entry:
        """Plan an edit on those in effect, put it on the model, and write it into the ledger.

        Args:
            requests: the facts.
            method: name of an installed method, with stages behind it or without.
            preset: a published set-up of the method, to start from.
            config: fields of the method's configuration.
            note: words for the history.

        Raises:
            KecoreError: as :meth:`kecore.Editor.edit` and :meth:`kecore_serve.ledger.Ledger.append`; nothing is
                changed then.
        """
        fields = dict(config or {})
        unknown = {"self", "requests", "method", "preset"} & fields.keys()
        if unknown:
            raise ConfigError(f"'{min(unknown)}' is no field of a method's configuration; `kecore methods` lists them")
        with self.ledger.writing():
            self.ledger.note = note
            try:
                edit = self.editor.edit(requests, method, preset=preset, **fields)
            finally:
                self.ledger.note = ""
                self.now = self._snapshot()
            return self.ledger.find(edit.id)

    def add(self, edit: Edit, *, note: str = "") -> Entry:
        """Put an edit that was planned on the base alone on the model, and into the ledger.

        Raises:
            KecoreError: as :meth:`kecore_serve.ledger.Ledger.append` and :meth:`kecore.edit.Edit.attach`.
        """
        before = self.now.state
        with self.ledger.writing():
            entry = self.ledger.append(edit, note=note)
            self._follow(before)
        return entry

    def revert(self, edit_id: str, *, note: str = "") -> Withdrawal:
        """Take an edit back, whichever it is.

        Raises:
            ArtifactError: there is no such edit.
            EditStateError: it is not in effect.
        """
        before = self.now.state
        with self.ledger.writing():
            withdrawal = self.ledger.revert(edit_id, author=_AUTHOR, note=note)
            self._follow(before)
        return withdrawal

    def tag(self, name: str) -> None:
        """Give the state of now a name.

        Raises:
            EditStateError: the name is taken.
        """
        with self.ledger.writing():
            self.sync()
            self.ledger.tag(name, author=_AUTHOR)

    def checkout(self, name: str) -> None:
        """Let the edits be on the model that were in effect at a tag or state.

        Raises:
            ArtifactError: there is no such tag or state.
        """
        before = self.now.state
        with self.ledger.writing():
            self.ledger.checkout(self._moment(name), author=_AUTHOR)
            self._follow(before)

    def sync(self) -> None:
        """Let those edits be on the model that are in effect in the ledger.

        Raises:
            ArtifactError: an edit's file is missing or damaged; the model stays as it was.
        """
        try:
            self.editor.synchronise()
        finally:
            self.now = self._snapshot()

    def _follow(self, before: str) -> None:
        """Let the model follow the ledger, or the ledger return to a state where it cannot."""
        try:
            self.sync()
        except BaseException:
            self.ledger.checkout(self._moment(before), author=_AUTHOR, note="the model could not follow")
            raise

    def _moment(self, name: str) -> str:
        """Return what the ledger calls a moment: the state without edits is none of its events."""
        return "base" if name == self._state_of(()) else name

    def _snapshot(self) -> Snapshot:
        active = tuple(entry.edit.id for entry in self.editor.history)
        return Snapshot(self._state_of(active), active)

    def _state_of(self, active: Sequence[str]) -> str:
        """Return the ledger's name of a model with these edits."""
        base = self.ledger.base
        return digest_of_state(base.digests[base.dtype], active)
