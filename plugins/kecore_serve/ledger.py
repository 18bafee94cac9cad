"""The ledger: an append-only history of a model's edits that outlives a crash at any moment.

A folder with ``ledger.sqlite`` (the events, in order), ``edits/`` (the edits) and ``states/`` (what methods remember
between edits). A file is written whole before the one transaction that makes it count, so a process that dies at any
moment leaves the ledger as it was before, or as it is after. Nothing that counts is ever changed or deleted: an edit
that is taken back stays in the history, and taking it back is an event of its own.
"""

from __future__ import annotations

import getpass
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor
from typing_extensions import Self

from kecore._version import __version__
from kecore.api.errors import (
    ArtifactError,
    ArtifactMismatchError,
    EditStateError,
    RequestConflictError,
    StoreInUseError,
)
from kecore.api.identity import Fingerprint
from kecore.api.types import check_conflicts
from kecore.edit import Edit, WeightEdit
from kecore.editor import Editor
from kecore.files import check_new_folder, explain_write_errors, file_digest, write_folder
from kecore.journal import Withdrawal
from kecore_serve.database import Database
from kecore_serve.history import History
from kecore_serve.reading import DATABASE, FORMAT, Difference, LedgerReader, last_of
from kecore_serve.records import Entry, Event, StateRecord, digest_of_state, facts_of
from kecore_serve.replay import replay_without
from kecore_serve.states import read_state, write_state

__all__ = ["Difference", "Ledger", "open_if_ledger"]

LOCK = "ledger.lock"


class Ledger(LedgerReader):
    """The history of the edits of one model; make it with :meth:`create` and open it with :meth:`open`.

    Threads may share one; each process opens its own. Those that write wait for each other.

    Args:
        folder: the folder, which holds a ledger.
        wait: seconds to wait for another process that plans an edit or writes.
        author: who writes, where a call names nobody; by default the user.
        note: words for the history, where a call has none.

    Raises:
        ArtifactError: there is no ledger, it is damaged, or it is of a newer kecore.
        StorageError: the place cannot be used.
    """

    def __init__(self, folder: str | Path, *, wait: float = 60.0, author: str | None = None, note: str = "") -> None:
        super().__init__(folder)
        self.wait, self.author, self.note = wait, author, note
        self._writer = FileLock(self.folder / LOCK)
        self._is_swept = False

    @classmethod
    def create(cls, folder: str | Path, model: str, base: Fingerprint) -> Self:
        """Begin a ledger.

        Args:
            folder: a directory that is not there yet, or empty.
            model: reference of the model, for those who open the ledger.
            base: fingerprint of its unedited weights.

        Raises:
            ArtifactError: there is something in the folder.
            StorageError: it cannot be written.
        """
        folder = Path(folder)
        check_new_folder(folder)
        meta = {
            "format": str(FORMAT),
            "version": __version__,
            "model": model,
            "base": json.dumps({"dtype": base.dtype, "digests": dict(base.digests)}),
            "created": repr(time.time()),
        }
        with write_folder(folder) as made:
            (made / "edits").mkdir()
            (made / "states").mkdir()
            Database.create(made / DATABASE, meta)
        return cls(folder)

    @classmethod
    def open(cls, folder: str | Path, *, wait: float = 60.0, author: str | None = None, note: str = "") -> Self:
        """Open a ledger; arguments and errors are those of the class."""
        return cls(folder, wait=wait, author=author, note=note)

    @classmethod
    def is_ledger(cls, folder: str | Path) -> bool:
        """Return whether a folder holds a ledger."""
        return (Path(folder) / DATABASE).is_file()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Let no other thread or process write inside the block; blocks nest.

        Hold it while an edit is planned, so that no other edit comes in between. The system lets the lock go when a
        process dies.

        Raises:
            StoreInUseError: another one holds it for longer than this ledger waits.
        """
        with explain_write_errors(self.folder / LOCK):
            try:
                self._writer.acquire(timeout=self.wait)
            except Timeout as error:
                raise StoreInUseError(
                    f"{self.folder} has been in use by another process or thread for {self.wait:.0f} s; it may be "
                    "planning an edit. Try again later"
                ) from error
        try:
            yield
        finally:
            self._writer.release()

    def append(
        self,
        edit: Edit,
        *,
        method: str | None = None,
        config: Mapping[str, Any] | None = None,
        seed: int | None = None,
        author: str | None = None,
        note: str = "",
        scores: Mapping[str, Any] | None = None,
        planned_on: str | None = None,
    ) -> Entry:
        """Add an edit to those in effect. Once this returns, it outlives a crash.

        Args:
            edit: the edit, planned on this ledger's base, with or without the edits in effect on it.
            method: name of the method; by default what the edit says, as with ``config`` and ``seed``.
            config: the method's configuration.
            seed: seed of the plan.
            author: who appends it; by default the user.
            note: words for the history.
            scores: scores by name.
            planned_on: the ledger's state whose edits were on the model when this one was planned. None for an edit
                that was planned on the base alone.

        Raises:
            ArtifactMismatchError: the edit is for another base.
            EditStateError: the edit is in effect already, or ``planned_on`` is no longer the ledger's state.
            RequestConflictError: it was planned on the base alone, and contradicts an edit in effect.
            StoreInUseError: another process is writing.
            StorageError: the disk is full, or the place is not writable; nothing was left half-written.
        """
        self._check_base(edit)
        with self.writing(), self._mutex:
            history = self._refresh()
            self._check_append(history, edit, planned_on)
            if edit.id in history.entries:  # taken back earlier: it comes into effect again
                body: dict[str, Any] = {"added": [edit.id]}
            else:
                parent = None
                if planned_on is not None:
                    parent = self._state_owner(history, edit.method)
                entry_values = self._write(edit, parent, planned_on is not None)
                given = {"method": method, "config": config, "seed": seed}
                entry_values.update({name: value for name, value in given.items() if value is not None})
                body = {"edits": [entry_values], "added": [edit.id]}
            if scores:
                body["scores"] = {edit.id: dict(scores)}
            self._add("append", body, author=author, note=note)
            return self._history.entries[edit.id]

    def revert(self, ids: str | Iterable[str], *, author: str | None = None, note: str = "") -> Withdrawal:
        """Take edits back, any of them: the weights are those of the base and the edits that stay, bit for bit.

        Edits that were planned later stay as they were planned. Where there are such, the result is not quite what it
        would be had the edit never been made; :func:`kecore_serve.replay.replay_without` plans them anew.

        Args:
            ids: beginnings of ids.
            author: who takes them back; by default the user.
            note: words for the history.

        Raises:
            ArtifactError: no such edit, or more than one that begins so.
            EditStateError: an edit is not in effect.
            StoreInUseError: another process is writing.
            StorageError: it cannot be written.
        """
        with self.writing(), self._mutex:
            history = self._refresh()
            removed = self.resolve_active(ids)
            later = self._later(history, removed)
            self._add("revert", {"removed": list(removed)}, author=author, note=note)
            return Withdrawal(removed, later=tuple(later), state=self.state)

    def take_back(
        self,
        ids: str | Iterable[str],
        open_session: Callable[[], Editor],
        *,
        facts: Sequence[str] = (),
        author: str | None = None,
        note: str = "",
    ) -> Withdrawal:
        """Take edits back, or some facts of one, and plan anew what was planned with them: as if never made.

        Where nothing in effect was planned with them, the weights and what methods remember are those of before, bit
        for bit, and no model is loaded. Otherwise the later edits are planned anew; see
        :func:`kecore_serve.replay.replay_without`.

        Args:
            ids: beginnings of ids; one where ``facts`` are named.
            open_session: opens a session on the unedited model, with all that the edits' methods need.
            facts: ids of the facts of the edit that are to be taken back; the others of the batch are planned anew.
            author: who does it; by default the user.
            note: words for the history.

        Raises:
            ArtifactError: no such edit or fact, or more than one that begins so.
            EditStateError: an edit is not in effect, or facts of several edits are named.
            StoreInUseError: another process is writing.
            StorageError: it cannot be written.
        """
        with self.writing():
            history = self._refresh()
            removed = self.resolve_active(ids)
            if not facts and not self._later(history, removed):
                return self.revert(removed, author=author, note=note)
            left_out = self._facts_to_leave_out(removed, facts)
            replay = replay_without(self, removed, open_session(), left_out=left_out, author=author, note=note)
            return replay

    def _facts_to_leave_out(self, ids: Sequence[str], facts: Sequence[str]) -> dict[str, frozenset[str]]:
        """Return which facts are to be left out of which edit; nothing where edits go as a whole."""
        if not facts:
            return {}
        if len(ids) > 1:
            raise EditStateError(f"facts of one edit are taken back at a time, and {len(ids)} edits are named")
        known = [fact["id"] for fact in self.find(ids[0]).facts]
        unknown = [fact for fact in facts if fact not in known]
        if unknown:
            raise ArtifactError(f"edit {ids[0]} has no fact {unknown[0]!r}; it has: {', '.join(known[:10])}")
        return {ids[0]: frozenset(facts)}

    def substitute(
        self,
        removed: Sequence[str],
        edits: Sequence[Edit],
        states_before: Sequence[Mapping[str, Tensor]],
        *,
        kept: int,
        author: str | None = None,
        note: str = "",
    ) -> tuple[Entry, ...]:
        """Let newly planned edits take the place of the last ones in effect, in one step.

        Args:
            removed: ids of the edits that go, with those that are replaced.
            edits: the new ones, in the order in which they were planned, each on those before it.
            states_before: for each, the state that its method began with.
            kept: number of edits in effect, from the first, that stay and were on the model.
            author: who does it; by default the user.
            note: words for the history.

        Raises:
            EditStateError: the ledger moved on meanwhile.
            StorageError: it cannot be written.
        """
        with self.writing(), self._mutex:
            history = self._refresh()
            stays = history.active[:kept]
            if set(history.active[kept:]) != set(removed):
                raise EditStateError(f"{self.folder} moved on while edits were planned anew; do it again")
            owners: dict[str, str | None] = {}
            new_values: list[dict[str, Any]] = []
            for edit, before in zip(edits, states_before, strict=True):
                self._check_base(edit)
                parent = owners.get(edit.method) or last_of(history, stays, edit.method)
                new_values.append(self._write(edit, parent, True, before))
                owners[edit.method] = edit.id
            body = {"removed": list(removed), "edits": new_values, "added": [edit.id for edit in edits]}
            self._add("replay", body, author=author, note=note)
            return tuple(self._history.entries[edit.id] for edit in edits)

    def score(self, id_: str, scores: Mapping[str, Any], *, author: str | None = None, note: str = "") -> Entry:
        """Record scores of an edit; those before stay in the history.

        Raises:
            ArtifactError: no such edit, or more than one that begins so.
        """
        with self.writing(), self._mutex:
            entry = self.find(id_)
            self._add("scores", {"scores": {entry.id: dict(scores)}}, author=author, note=note)
            return self._history.entries[entry.id]

    def tag(self, name: str, at: str = "head", *, author: str | None = None, note: str = "") -> str:
        """Give a moment of the ledger a name.

        Args:
            name: the name, which no other moment has.
            at: which moment, as :meth:`diff` takes it.
            author: who gives it; by default the user.
            note: words for the history.

        Returns:
            The state that the name means.

        Raises:
            EditStateError: the name is taken, empty or has another meaning.
        """
        with self.writing(), self._mutex:
            history = self._refresh()
            if not name.strip() or name in ("head", "base"):
                raise EditStateError(f"a tag cannot be called {name!r}; choose another name")
            if name in history.tags:
                raise EditStateError(f"{self.folder} has a tag {name!r} already; tags do not move, choose another name")
            number = history.resolve(at, str(self.folder))
            self._add("tag", {"tag": name, "to": number}, author=author, note=note)
            return self._state_at(self._history, number)

    def checkout(self, name: str, *, author: str | None = None, note: str = "") -> str:
        """Let the edits be in effect that were at an earlier moment, and no others; what came since stays recorded.

        Args:
            name: which moment, as :meth:`diff` takes it.
            author: who does it; by default the user.
            note: words for the history.

        Returns:
            The state.

        Raises:
            ArtifactError: the name means nothing here.
        """
        with self.writing(), self._mutex:
            history = self._refresh()
            number = history.resolve(name, str(self.folder))
            active = history.active_at(number)
            if active != history.active:
                self._add("checkout", {"to": name, "active": active}, author=author, note=note)
            return self.state

    def _add(self, kind: str, body: Mapping[str, Any], *, author: str | None, note: str) -> None:
        """Write one event; what it speaks of is on disk already."""
        history = self._history
        plain_body = json.loads(json.dumps(body, ensure_ascii=False))  # as it will be read back
        event = Event(
            history.number + 1,
            kind,
            time.time(),
            author or self.author or user_name(),
            note or self.note,
            plain_body,
            "",
        )
        event = replace(event, state=digest_of_state(self._base_digest, history.active_after(event)))
        event = replace(event, chain=event.chained(history.chain))
        self._database.add(event)
        history.add(event)

    def _write(
        self, edit: Edit, parent: str | None, on_others: bool, before: Mapping[str, Tensor] | None = None
    ) -> dict[str, Any]:
        """Write the files of an edit, and return its record; nothing counts yet.

        Args:
            edit: the edit.
            parent: the edit whose state the method began with.
            on_others: the edit was planned with the edits in effect on the model.
            before: that state; read from the ledger where it is not given.
        """
        self._sweep()
        history = self._history
        if before is None:
            before = read_state(self.folder, history.entries, parent)
        state = write_state(self.folder, edit.id, parent, before, edit.state) if edit.state else StateRecord(parent)
        path = replace(edit, state={}).save(self.folder / "edits" / f"{edit.id}.safetensors")
        entry = Entry(
            id=edit.id,
            event=history.number + 1,
            time=0.0,
            author="",
            method=edit.method,
            config=edit.config,
            seed=edit.seed,
            facts=facts_of(edit),
            note="",
            file=path.relative_to(self.folder).as_posix(),
            digest=file_digest(path),
            planned_after=history.number if on_others else None,
            state=state,
        )
        return entry.to_json()

    def _sweep(self) -> None:
        """Delete, once, what dead writers left; no other one is at work while this one may write."""
        if self._is_swept:
            return
        for path in self.leftovers():
            path.unlink(missing_ok=True)
        self._is_swept = True

    def _check_base(self, edit: Edit) -> None:
        if edit.base.digests.get(self.base.dtype) != self._base_digest:
            raise ArtifactMismatchError(
                f"the edit by {edit.method} was made for other weights than this ledger's base '{self.model}': "
                f"fingerprint expected {self._base_digest[:12]}, got "
                f"{edit.base.digests.get(self.base.dtype, 'none')[:12]}; plan it on the ledger's model"
            )

    def _check_append(self, history: History, edit: Edit, planned_on: str | None) -> None:
        if edit.id in history.active:
            raise EditStateError(f"edit {edit.id} is in effect in {self.folder} already; it was not appended again")
        if planned_on is not None and planned_on != self.state:
            raise EditStateError(
                f"the edit was planned on state {planned_on}, and {self.folder} is at {self.state} by now; plan it anew"
            )
        if planned_on is None and isinstance(edit, WeightEdit):
            earlier = [self.load(history.entries[id_]) for id_ in history.active]
            requests = [request for item in earlier if isinstance(item, WeightEdit) for request in item.requests]
            try:
                check_conflicts([*requests, *edit.requests])
            except RequestConflictError as error:
                raise RequestConflictError(
                    f"{error}. The edit was planned on the base alone, and beside the edits in effect it would write "
                    "neither; plan it on the ledger"
                ) from error

    @staticmethod
    def _later(history: History, removed: Sequence[str]) -> list[str]:
        """Return the edits in effect, beside some, that were planned while one of these was."""
        later = {id_ for gone in removed for id_ in history.planned_with(gone)}
        return [id_ for id_ in history.active if id_ in later and id_ not in removed]


def open_if_ledger(folder: Path) -> Ledger | None:
    """Open the ledger in a folder; return None where there is none. What ``kecore edit --ledger`` finds it by."""
    return Ledger.open(folder) if Ledger.is_ledger(folder) else None


def user_name() -> str:
    """Return the name of the user who runs the program, or their number where it has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # which of them depends on the version of Python
        return str(os.getuid()) if hasattr(os, "getuid") else "unknown"
