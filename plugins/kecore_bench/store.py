"""The store of results: one SQLite file that survives a kill and knows its protocol.

A *run* is one method on one model and one data set. Each of its records is written, with everything that the model
answered, in the transaction that finishes it: after a kill the file holds whole records, and a run that goes on asks
it which are missing. Numbers are never stored: they are worked out from the answers whenever a table is made.
"""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kecore.api.errors import ArtifactError, KecoreError, ProtocolMismatchError, StorageError, StoreInUseError
from kecore.evaluate.answers import RecordResult
from kecore.evaluate.protocol import Protocol, same_protocol
from kecore_bench.published import PaperTable

__all__ = ["BEFORE", "Failure", "RunSpec", "Store"]

BEFORE = "before"
"""The moment of the unedited model."""

_FORMAT = "1"
_PATIENCE = 60.0
"""Seconds that a writer waits for another one's transaction, which takes milliseconds."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS runs (key TEXT PRIMARY KEY, spec TEXT NOT NULL, made_on TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answers (
    run TEXT NOT NULL REFERENCES runs, moment TEXT NOT NULL, position INTEGER NOT NULL, id TEXT NOT NULL,
    row TEXT NOT NULL, PRIMARY KEY (run, moment, position));
CREATE TABLE IF NOT EXISTS costs (
    run TEXT NOT NULL REFERENCES runs, part TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (run, part));
CREATE TABLE IF NOT EXISTS failures (
    run TEXT NOT NULL REFERENCES runs, part TEXT NOT NULL, kind TEXT NOT NULL, message TEXT NOT NULL,
    PRIMARY KEY (run, part));
"""


@dataclass(frozen=True)
class RunSpec:
    """All settings that decide a run's answers, beside the protocol.

    Args:
        label: its name in tables.
        method: name of an installed method; None for the model as it is, or with a given edit.
        model: reference of the model.
        data: data set, as ``name``, ``sha256``, ``format``.
        size: number of records.
        config: all fields of the method's configuration.
        loading: type of the weights and what else decides how the model is loaded.
        statistics: source of the key statistics, for methods that need them.
        edit: digest and name of an edit that was made before, where one is scored.
        given: digests of the trained editors and the examples that the method was given, where it needs some.
    """

    label: str
    method: str | None
    model: str
    data: Mapping[str, Any]
    size: int
    config: Mapping[str, Any] = field(default_factory=dict)
    loading: Mapping[str, Any] = field(default_factory=dict)
    statistics: Mapping[str, Any] | None = None
    edit: Mapping[str, str] | None = None
    given: Mapping[str, Any] | None = None

    @property
    def key(self) -> str:
        """Digest of all fields."""
        values = asdict(self)
        if self.given is None:  # stores that were begun before there was such a field go on
            del values["given"]
        return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:24]

    @property
    def group(self) -> tuple[str, str, int]:
        """Model, data set and number of records: what the rows of one table have in common."""
        return (json.dumps([self.model, dict(self.loading)]), json.dumps(dict(self.data)), self.size)


@dataclass(frozen=True, slots=True)
class Failure:
    """A part of a run that ended in an error.

    Args:
        part: a record's id, ``all``, or ``step-3``.
        kind: class of the error.
        message: its message.
    """

    part: str
    kind: str
    message: str


class Store:
    """A file of results by one protocol.

    As a context manager it closes the file; where the block ends in an error before any run began, a file that was made
    for it goes again, with the folders that were made for it.

    Args:
        path: the file; it is made if it is not there and a protocol is given. ``":memory:"`` keeps nothing.
        protocol: that of the results to be written; None to read what is there.

    Raises:
        ArtifactError: the file is not there, or it is no store.
        ProtocolMismatchError: its results follow another protocol.
        StorageError: it cannot be written.
    """

    def __init__(self, path: str | Path, protocol: Protocol | None = None) -> None:
        self.path = Path(path)
        self.on_disk = str(path) != ":memory:"
        if protocol is None and self.on_disk and not self.path.exists():
            raise ArtifactError(
                f"{path}: no such store; make it with `kecore bench`, `kecore eval` or `kecore compare`"
            )
        self._is_new = self.on_disk and not self.path.exists()
        self._new_folders = [folder for folder in self.path.parents if self._is_new and not folder.exists()]
        with self._guard():
            if self._is_new:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None)
            if protocol is not None:
                self._make_tables(protocol)
            meta = dict(self._connection.execute("SELECT key, value FROM meta"))
        if meta.get("format") != _FORMAT:
            raise ArtifactError(f"{path} is a store of another kecore (format {meta.get('format')}, not {_FORMAT})")
        self.protocol = Protocol.make(json.loads(meta["protocol"]))
        if protocol is not None:
            self._check_protocol(protocol)

    def _make_tables(self, protocol: Protocol) -> None:
        """Make the tables of a new file; those that are there stay."""
        with self._transaction() as cursor:
            for statement in _SCHEMA.split(";"):
                cursor.execute(statement)
            meta = [("format", _FORMAT), ("protocol", json.dumps(protocol.to_json()))]
            cursor.executemany("INSERT OR IGNORE INTO meta VALUES (?, ?)", meta)

    def _check_protocol(self, protocol: Protocol) -> None:
        """Refuse to write results by another protocol than those that are there.

        Raises:
            ProtocolMismatchError: says how the two differ.
        """
        same_protocol(self.protocol, protocol, f"{self.path.name} and this run")
        if self.protocol != protocol:
            raise ProtocolMismatchError(
                f"{self.path.name} was begun with the metric families {_families(self.protocol)}, this run takes "
                f"{_families(protocol)}; use another store"
            )

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        is_void = kind is not None and self._is_new and not self.specs()
        self.close()
        if is_void:
            self._remove()

    def _remove(self) -> None:
        """Delete the file, and the folders that were made for it as far as nothing else is in them."""
        for file in (self.path, Path(f"{self.path}.lock")):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # the first folder that holds something ends it
            for folder in self._new_folders:
                folder.rmdir()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other runs out while a block runs.

        Raises:
            StoreInUseError: another run is writing.
        """
        if not self.on_disk:
            yield
            return
        lock = FileLock(f"{self.path}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise StoreInUseError(
                f"{self.path} is being written by another run on this machine; wait for it, or name another store"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def announce(self, specs: Sequence[RunSpec]) -> None:
        """Fix the order of runs in tables before any begins, whichever process then begins first."""
        with self._transaction() as cursor:
            values = [(spec.key, json.dumps(asdict(spec)), "") for spec in specs]
            cursor.executemany("INSERT OR IGNORE INTO runs VALUES (?, ?, ?)", values)

    def cite(self, tables: Sequence[PaperTable]) -> None:
        """Keep tables of papers for the reports; those that are there stay."""
        with self._transaction() as cursor:
            published = self.published
            published += [table for table in tables if table not in published]
            text = json.dumps([table.model_dump(mode="json") for table in published])
            cursor.execute("INSERT OR REPLACE INTO meta VALUES ('published', ?)", (text,))

    @property
    def published(self) -> list[PaperTable]:
        """Tables of papers that stand beside the results."""
        rows = self._fetch("SELECT value FROM meta WHERE key = 'published'")
        if not rows:
            return []
        return [PaperTable.model_validate(values) for values in json.loads(rows[0][0])]

    def add_run(self, spec: RunSpec, made_on: Mapping[str, Any]) -> None:
        """Enter a run that begins, once.

        Args:
            spec: the run.
            made_on: versions, hardware and fingerprint of the model.

        Raises:
            ArtifactError: it was begun with other versions of kecore and torch, or on other weights, and would be of
                two kinds.
        """
        self.announce([spec])
        with self._transaction() as cursor:
            cursor.execute(
                "UPDATE runs SET made_on = ? WHERE key = ? AND made_on = ''", (json.dumps(made_on), spec.key)
            )
        first = self.made_on(spec.key)
        for name in ("versions", "base"):
            if first[name] != made_on[name]:
                raise ArtifactError(
                    f"run '{spec.label}' of {self.path.name} was begun with other {name} ({first[name]}, now "
                    f"{made_on[name]}), so its records would not be alike; use a new store"
                )

    def add(
        self, run: str, moment: str, rows: Mapping[int, RecordResult], cost: tuple[str, Mapping[str, Any]] | None = None
    ) -> None:
        """Write records that are done, all or none.

        Args:
            run: key of the run.
            moment: when they were scored.
            rows: their answers by position in the data set.
            cost: a part of the run and what its edit cost, where these records had one of their own.
        """
        values = [(run, moment, position, row.id, row.dump()) for position, row in rows.items()]
        with self._transaction() as cursor:
            # A record that is there already was made by the same spec: the first one stays.
            cursor.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?)", values)
            if cost is not None:
                part, value = cost
                cursor.execute("INSERT OR IGNORE INTO costs VALUES (?, ?, ?)", (run, part, json.dumps(value)))

    def add_cost(self, run: str, part: str, value: Mapping[str, Any]) -> None:
        """Write what an edit cost."""
        self.add(run, "", {}, (part, value))

    def fail(self, run: str, part: str, error: KecoreError) -> None:
        """Write that a part of a run ended in an error."""
        with self._transaction() as cursor:
            values = (run, part, type(error).__name__, str(error))
            cursor.execute("INSERT OR REPLACE INTO failures VALUES (?, ?, ?, ?)", values)

    def forget_failures(self, run: str) -> None:
        """Let what failed be tried again."""
        with self._transaction() as cursor:
            cursor.execute("DELETE FROM failures WHERE run = ?", (run,))

    def specs(self) -> list[RunSpec]:
        """Return all runs that were begun, in the order they were announced."""
        rows = self._fetch("SELECT spec FROM runs WHERE made_on != '' ORDER BY rowid")
        return [RunSpec(**json.loads(text)) for (text,) in rows]

    def made_on(self, run: str) -> dict[str, Any]:
        """Return versions, hardware and fingerprint that a run was begun with."""
        return json.loads(self._fetch("SELECT made_on FROM runs WHERE key = ?", run)[0][0])

    def moments(self, run: str) -> list[str]:
        """Return the moments that a run has answers of."""
        return [name for (name,) in self._fetch("SELECT DISTINCT moment FROM answers WHERE run = ? ORDER BY 1", run)]

    def done(self, run: str, moment: str) -> set[int]:
        """Return the positions of the records that are written."""
        rows = self._fetch("SELECT position FROM answers WHERE run = ? AND moment = ?", run, moment)
        return {position for (position,) in rows}

    def count(self, runs: Sequence[str]) -> int:
        """Return the number of records, at all moments, of these runs."""
        marks = ", ".join("?" * len(runs))
        query = f"SELECT count(*) FROM answers WHERE run IN ({marks})"  # noqa: S608 - marks only
        return self._fetch(query, *runs)[0][0]

    def rows(self, run: str, moment: str, positions: range | None = None) -> dict[int, RecordResult]:
        """Return the answers by position, in the order of the data set; of all positions, or of some in a row."""
        query = "SELECT position, row FROM answers WHERE run = ? AND moment = ? AND position >= ? AND position < ?"
        chosen = range(sys.maxsize) if positions is None else positions
        rows = self._fetch(f"{query} ORDER BY position", run, moment, chosen.start, chosen.stop)
        return {position: RecordResult.load(row) for position, row in rows}

    def costs(self, run: str) -> dict[str, dict[str, Any]]:
        """Return what each edit of a run cost, by the part of the run."""
        rows = self._fetch("SELECT part, value FROM costs WHERE run = ? ORDER BY rowid", run)
        return {part: json.loads(value) for part, value in rows}

    def failures(self, run: str) -> list[Failure]:
        """Return what of a run ended in an error."""
        query = "SELECT part, kind, message FROM failures WHERE run = ? ORDER BY rowid"
        return [Failure(*row) for row in self._fetch(query, run)]

    def edit_file(self, run: str) -> Path | None:
        """Return where the edit of a run that scores many records by one edit lies until all are scored.

        None for a store that is not kept either.
        """
        folder = self.edit_folder(run)
        if folder is None:
            return None
        return folder.with_suffix(".safetensors")

    def edit_folder(self, run: str) -> Path | None:
        """Return the folder of the edits of a sequence, which lie there until all are scored; None as above."""
        if not self.on_disk:
            return None
        return self.path.with_name(f"{self.path.name}.edits") / run

    def _fetch(self, query: str, *values: object) -> list[Any]:
        """Return all rows that a query gives."""
        with self._guard():
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Cursor]:
        with self._guard():
            cursor = self._connection.cursor()
            cursor.execute("BEGIN IMMEDIATE")
            try:
                yield cursor
            except BaseException:
                cursor.execute("ROLLBACK")
                raise
            cursor.execute("COMMIT")

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Turn what SQLite refuses into typed errors."""
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:
            if "no such table" in str(error):
                raise ArtifactError(f"{self.path} is no store of kecore's; name another file") from None
            raise StorageError(
                f"{self.path}: {error}; nothing was left half-written. Make room, or name another place"
            ) from error
        except sqlite3.DatabaseError as error:
            raise ArtifactError(
                f"{self.path} is no store of kecore's, or damaged ({error}); name another file"
            ) from None


def _families(protocol: Protocol) -> str:
    """Return the names of the metric families of a protocol."""
    return ", ".join(("the standard ones", *protocol.extra))
