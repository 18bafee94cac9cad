"""The database of a ledger: one SQLite file in WAL mode, to which events are only ever added."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kecore.api.errors import ArtifactError, StorageError, StoreInUseError
from kecore_serve.records import Event

__all__ = ["Database"]

_PATIENCE = 60.0
"""Seconds that a transaction waits for another one, which takes milliseconds."""

_FULL = "SELECT number, kind, time, author, note, body, state, chain FROM events WHERE number > ? ORDER BY number"

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE events (
    number INTEGER PRIMARY KEY, kind TEXT NOT NULL, time REAL NOT NULL, author TEXT NOT NULL, note TEXT NOT NULL,
    body TEXT NOT NULL, state TEXT NOT NULL, chain TEXT NOT NULL) STRICT;
CREATE TRIGGER no_change BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'a ledger is only ever added to'); END;
CREATE TRIGGER no_delete BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'a ledger is only ever added to'); END;
"""


class Database:
    """The events of a ledger in their file; threads may share it, processes each open their own.

    Args:
        path: the file, which is there.

    Raises:
        ArtifactError: it is damaged, or the database of something else.
        StorageError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        with self._explain():
            # A URI in mode rw never makes an empty file where there is none.
            self._connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode=rw",
                uri=True,
                timeout=_PATIENCE,
                isolation_level=None,
                check_same_thread=False,
            )
            # FULL: a committed transaction outlives a loss of power, also in WAL mode.
            self._connection.execute("PRAGMA synchronous = FULL")

    @classmethod
    def create(cls, path: Path, meta: Mapping[str, str]) -> None:
        """Make the file with no event in it.

        Raises:
            StorageError: it cannot be written.
        """
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(_SCHEMA)
            connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        except sqlite3.Error as error:
            raise StorageError(f"{path} cannot be written: {error}") from error
        finally:
            connection.close()

    def meta(self) -> dict[str, str]:
        """Return what the ledger is of."""
        with self._lock, self._explain():
            return dict(self._connection.execute("SELECT key, value FROM meta"))

    def events(self, after: int, chain: str) -> list[Event]:
        """Return the events behind one, each checked against the chain.

        Args:
            after: number of the last event that is known.
            chain: its chain.

        Raises:
            ArtifactError: an event is damaged, missing or was changed.
        """
        with self._lock, self._explain():
            rows = self._connection.execute(_FULL, (after,)).fetchall()
        events: list[Event] = []
        for number, row in enumerate(rows, after + 1):
            if row[0] != number:
                raise ArtifactError(f"{self.path}: event {number} is missing; restore the file from a copy")
            events.append(Event.read(row, chain, str(self.path)))
            chain = events[-1].chain
        return events

    def last(self) -> tuple[int, str]:
        """Return the number of the last event and the state after it; 0 and no state where there is none."""
        with self._lock, self._explain():
            row = self._connection.execute("SELECT number, state FROM events ORDER BY number DESC LIMIT 1").fetchone()
        return (0, "") if row is None else (row[0], row[1])

    def add(self, event: Event) -> None:
        """Write one event, in one transaction.

        Raises:
            StoreInUseError: another process wrote meanwhile.
            StorageError: the disk is full, or the place is not writable.
        """
        body = json.dumps(event.body, ensure_ascii=False)
        row = (event.number, event.kind, event.time, event.author, event.note, body, event.state, event.chain)
        with self._lock, self._explain():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._connection.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def check(self) -> None:
        """Let SQLite check the file's own structure.

        Raises:
            ArtifactError: says what it found.
        """
        with self._lock, self._explain():
            (found,) = self._connection.execute("PRAGMA integrity_check").fetchone()
        if found != "ok":
            raise ArtifactError(f"{self.path} is damaged: {found}; restore it from a copy")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def _explain(self) -> Iterator[None]:
        """Turn SQLite's errors into typed ones."""
        try:
            yield
        except sqlite3.IntegrityError as error:
            raise StoreInUseError(f"{self.path} was written to by another process meanwhile; try again") from error
        except sqlite3.OperationalError as error:
            self._raise_operational(error)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{self.path} is damaged or no ledger ({error}); restore it from a copy") from error

    def _raise_operational(self, error: sqlite3.OperationalError) -> None:
        message = str(error)
        if "locked" in message or "busy" in message:
            raise StoreInUseError(
                f"{self.path} has been in use by another process for {_PATIENCE:.0f} s; try again later"
            ) from error
        if "no such table" in message or "no such column" in message:
            raise ArtifactError(f"{self.path} is no ledger ({message}); restore it from a copy") from error
        raise StorageError(
            f"{self.path} cannot be used: {message}; nothing was left half-written. Make room, or make the place "
            "writable"
        ) from error
