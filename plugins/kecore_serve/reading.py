"""Reading a ledger: its edits, its moments, and what methods remember at each."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kecore.api.errors import ArtifactError, EditStateError
from kecore.api.identity import Fingerprint
from kecore.edit import Edit, load_edit
from kecore.files import file_digest
from kecore_serve.database import Database
from kecore_serve.history import History
from kecore_serve.records import Entry, Event, digest_of_state
from kecore_serve.states import ancestors, read_state

__all__ = ["DATABASE", "FORMAT", "Difference", "LedgerReader", "last_of"]

DATABASE = "ledger.sqlite"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Difference:
    """How two moments of a ledger differ.

    Args:
        first: state at the first.
        second: state at the second.
        only_first: edits that were in effect at the first alone, in order.
        only_second: edits that were in effect at the second alone, in order.
        both: number of edits that were in effect at both.
    """

    first: str
    second: str
    only_first: tuple[Entry, ...]
    only_second: tuple[Entry, ...]
    both: int


class LedgerReader:
    """What can be asked of a ledger; :class:`kecore_serve.ledger.Ledger` also writes.

    Args:
        folder: the folder, which holds a ledger.

    Raises:
        ArtifactError: there is no ledger, it is damaged, or it is of a newer kecore.
        StorageError: the place cannot be used.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / DATABASE
        if not path.is_file():
            raise ArtifactError(f"{folder} holds no ledger; expected a folder that `kecore ledger init MODEL DIR` made")
        self._database = Database(path)
        self.base, self.model = self._read_meta()
        self._history = History()
        self._mutex = threading.RLock()
        self._refresh()

    def close(self) -> None:
        """Close the database; the object cannot be used any more."""
        self._database.close()

    def __repr__(self) -> str:
        return f"<Ledger {self.folder} of {self.model}: {len(self.active())} edits in effect, state {self.state}>"

    @property
    def state(self) -> str:
        """A short digest of the base and of the edits in effect, in order, as the ledger is now."""
        return self._database.last()[1] or digest_of_state(self._base_digest, ())

    def entries(self) -> tuple[Entry, ...]:
        """Return every edit that was ever appended, in order; also those that were taken back."""
        return tuple(self._refresh().entries.values())

    def active(self) -> tuple[Entry, ...]:
        """Return the edits in effect, in the order in which they are put on the base."""
        history = self._refresh()
        return tuple(history.entries[id_] for id_ in history.active)

    def events(self) -> tuple[Event, ...]:
        """Return everything that happened, in order."""
        return tuple(self._refresh().events)

    @property
    def tags(self) -> dict[str, str]:
        """Tags and the states that they name."""
        history = self._refresh()
        return {name: self._state_at(history, number) for name, number in history.tags.items()}

    def find(self, beginning: str) -> Entry:
        """Return the one edit whose id begins so.

        Raises:
            ArtifactError: there is none, or more than one.
        """
        return self._refresh().find(beginning, str(self.folder))

    def load(self, entry: Entry) -> Edit:
        """Read an edit, without the state of its method.

        Raises:
            ArtifactError: its file is missing or was changed.
        """
        path = self.folder / entry.file
        if not path.is_file():
            raise ArtifactError(f"{path}, edit {entry.id} of the ledger, is missing; restore it from a copy")
        if file_digest(path) != entry.digest:
            raise ArtifactError(f"{path}, edit {entry.id} of the ledger, was changed; restore it from a copy")
        return load_edit(path)

    def active_ids(self) -> tuple[str, ...]:
        """Return the ids of the edits in effect, in order."""
        return tuple(self._refresh().active)

    def load_edit(self, id_: str) -> Edit:
        """Read an edit by its id; see :meth:`load`."""
        return self.load(self.find(id_))

    def path_of(self, id_: str) -> Path:
        """Return the file of an edit; see :meth:`find`."""
        return self.folder / self.find(id_).file

    def method_state(self, method: str) -> dict[str, Tensor]:
        """Return what a method's next edit has to know of those in effect.

        Args:
            method: the method's name.

        Raises:
            ArtifactError: a file is missing or damaged.
            EditStateError: an edit was taken back on which later ones of the method build, so that what the method
                would remember without it is not known; replay the later ones.
        """
        history = self._refresh()
        return read_state(self.folder, history.entries, self._state_owner(history, method))

    def states_behind(self, count: int) -> dict[str, dict[str, Tensor]]:
        """Return what each method remembered when the first ``count`` edits in effect were all there were.

        Raises:
            ArtifactError: a file is missing or damaged.
            EditStateError: it is not known; see :meth:`method_state`.
        """
        history = self._refresh()
        active = history.active[:count]
        methods = dict.fromkeys(history.entries[id_].method for id_ in active)
        return {
            method: read_state(self.folder, history.entries, self._state_owner(history, method, active))
            for method in methods
        }

    def diff(self, a: str, b: str = "head") -> Difference:
        """Return how two moments differ.

        Args:
            a: a tag, a state, an edit (the moment after it came), ``base`` or ``head``.
            b: the same.

        Raises:
            ArtifactError: a name means nothing here, or more than one thing.
        """
        history = self._refresh()
        numbers = [history.resolve(name, str(self.folder)) for name in (a, b)]
        first, second = (history.active_at(number) for number in numbers)
        return Difference(
            first=self._state_at(history, numbers[0]),
            second=self._state_at(history, numbers[1]),
            only_first=tuple(history.entries[id_] for id_ in first if id_ not in second),
            only_second=tuple(history.entries[id_] for id_ in second if id_ not in first),
            both=len(set(first) & set(second)),
        )

    def resolve_active(self, ids: str | Iterable[str]) -> tuple[str, ...]:
        """Return the ids of edits in effect by their beginnings, in the order in which they came into effect.

        Raises:
            ArtifactError: no such edit, or more than one that begins so.
            EditStateError: none was named, or one is not in effect.
        """
        history = self._refresh()
        beginnings = [ids] if isinstance(ids, str) else list(ids)
        chosen = {history.find(beginning, str(self.folder)).id for beginning in beginnings}
        if not chosen:
            raise EditStateError("no edit was named; give at least one id")
        for id_ in chosen:
            if id_ not in history.active:
                raise EditStateError(f"edit {id_} is not in effect in {self.folder}: it was taken back already")
        return tuple(id_ for id_ in history.active if id_ in chosen)

    def check_database(self) -> None:
        """Check the database and, from the first event on, the chain of events.

        Raises:
            ArtifactError: it is damaged, or something in it was changed.
        """
        self._database.check()
        self._database.events(0, "")

    def leftovers(self) -> list[Path]:
        """Return files of writers that died before what they wrote counted."""
        counted = {self.folder / entry.file for entry in self.entries()}
        counted |= {self.folder / entry.state.file for entry in self.entries() if entry.state.file}
        files = [path for name in ("edits", "states") for path in sorted((self.folder / name).iterdir())]
        return [path for path in files if path not in counted]

    @property
    def _base_digest(self) -> str:
        return self.base.digests[self.base.dtype]

    def _read_meta(self) -> tuple[Fingerprint, str]:
        meta = self._database.meta()
        try:
            if int(meta["format"]) > FORMAT:
                raise ArtifactError(
                    f"{self.folder} was written by kecore {meta['version']} in a newer format; install that version "
                    "or a newer one"
                )
            values = json.loads(meta["base"])
            base = Fingerprint(str(values["dtype"]), dict(values["digests"]))
            base.digests[base.dtype]
            return base, meta["model"]
        except (KeyError, ValueError, TypeError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(f"{self.folder / DATABASE} is damaged ({error!r}); restore it from a copy") from error

    def _refresh(self) -> History:
        """Take in what was written since, by this or another process."""
        with self._mutex:
            history = self._history
            if self._database.last()[0] != history.number:
                for event in self._database.events(history.number, history.chain):
                    history.add(event)
            return history

    def _state_owner(self, history: History, method: str, active: Sequence[str] | None = None) -> str | None:
        """Return the last edit of a method among those in effect, whose state is gone on with; None for none.

        Raises:
            EditStateError: its state was made with edits that are not in effect.
        """
        active = history.active if active is None else active
        last = last_of(history, active, method)
        if last is None:
            return None
        known = ancestors(history.entries, last)
        expected = [id_ for id_ in active if history.entries[id_].method == method]
        remembers = any(history.entries[id_].state.written for id_ in {*known, *expected})
        if known != expected and remembers:
            withdrawn = [id_ for id_ in known if id_ not in expected]
            raise EditStateError(
                f"what '{method}' remembers in {self.folder} includes {', '.join(withdrawn) or 'not all edits'}, and "
                "other edits are in effect; check out an earlier state, and take edits back without --keep-later"
            )
        return last

    def _state_at(self, history: History, number: int) -> str:
        return history.events[number - 1].state if number else digest_of_state(self._base_digest, ())


def last_of(history: History, active: Sequence[str], method: str) -> str | None:
    """Return the last of some edits that is of a method."""
    for id_ in reversed(active):
        if history.entries[id_].method == method:
            return id_
    return None
