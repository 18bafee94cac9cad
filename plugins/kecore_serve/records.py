"""What a ledger says about its edits and its events: records, as JSON values and as objects."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kecore.api.errors import ArtifactError
from kecore.edit import Edit

__all__ = ["Entry", "Event", "StateRecord", "digest_of_state", "facts_of"]


@dataclass(frozen=True, slots=True)
class StateRecord:
    """What an edit changed in its method's state: tensors that the method's next edit reads.

    Args:
        parent: id of the edit whose state the method began with; None for the method's first edit.
        file: the file with the tensors that were written, relative to the ledger's folder; None where there are none.
        digest: SHA-256 of that file.
        written: names of the tensors in the file.
        removed: names of tensors that the parent's state has and this one does not.
    """

    parent: str | None = None
    file: str | None = None
    digest: str | None = None
    written: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {
            "parent": self.parent,
            "file": self.file,
            "digest": self.digest,
            "written": list(self.written),
            "removed": list(self.removed),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StateRecord:
        """Make the record of :meth:`to_json`."""
        return cls(
            values["parent"], values["file"], values["digest"], tuple(values["written"]), tuple(values["removed"])
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """One edit of a ledger.

    Args:
        id: the edit's id; any beginning of it that is unambiguous names the edit.
        event: number of the event that brought it.
        time: seconds since the epoch at which it was appended.
        author: who appended it.
        method: name of the method.
        config: the method's configuration as JSON values.
        seed: seed of the plan.
        facts: what was asked for, each as ``{"id", "prompt", "target"}``.
        note: words of the author.
        file: the edit's file, relative to the ledger's folder.
        digest: SHA-256 of that file.
        planned_after: number of the event after which the edit was planned; None of an edit that was planned on the
            base alone.
        state: what the edit changed in its method's state.
        scores: the latest scores that were recorded for it, by name; empty where there are none.
    """

    id: str
    event: int
    time: float
    author: str
    method: str
    config: Mapping[str, Any]
    seed: int
    facts: tuple[Mapping[str, str], ...]
    note: str
    file: str
    digest: str
    planned_after: int | None
    state: StateRecord
    scores: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return what identifies the edit, as JSON values; without what the event itself says."""
        return {
            "id": self.id,
            "method": self.method,
            "config": dict(self.config),
            "seed": self.seed,
            "facts": [dict(fact) for fact in self.facts],
            "file": self.file,
            "digest": self.digest,
            "planned_after": self.planned_after,
            "state": self.state.to_json(),
        }

    @classmethod
    def of(cls, event: Event, values: Mapping[str, Any]) -> Entry:
        """Make the entry that an event brought.

        Args:
            event: the event.
            values: what :meth:`to_json` gave.
        """
        return cls(
            id=values["id"],
            event=event.number,
            time=event.time,
            author=event.author,
            method=values["method"],
            config=values["config"],
            seed=values["seed"],
            facts=tuple(values["facts"]),
            note=event.note,
            file=values["file"],
            digest=values["digest"],
            planned_after=values["planned_after"],
            state=StateRecord.from_json(values["state"]),
            scores=event.body.get("scores", {}).get(values["id"], {}),
        )


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a ledger; events are never changed or deleted.

    Args:
        number: counted from 1.
        kind: ``append``, ``revert``, ``replay``, ``checkout``, ``tag`` or ``scores``.
        time: seconds since the epoch.
        author: who did it.
        note: words of the author.
        body: what happened, as JSON values: ``edits`` that are new (as :meth:`Entry.to_json` gives them), ``added`` and
            ``removed`` ids, ``tag``, ``to``, ``scores``.
        state: digest of the edits in effect after it.
        chain: digest of this event and of all before it.
    """

    number: int
    kind: str
    time: float
    author: str
    note: str
    body: Mapping[str, Any]
    state: str
    chain: str = ""

    def chained(self, previous: str) -> str:
        """Return the digest of this event behind the chain so far."""
        values = [self.number, self.kind, self.time, self.author, self.note, self.body, self.state]
        text = json.dumps(values, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(f"{previous}\n{text}".encode()).hexdigest()

    @classmethod
    def read(cls, row: Sequence[Any], previous: str, where: str) -> Event:
        """Make the event of a row of the database, which has to continue the chain.

        Args:
            row: the columns, in the order of this class's fields.
            previous: the chain of the event before.
            where: the database, for messages.

        Raises:
            ArtifactError: the row is damaged, or it was changed.
        """
        try:
            number, kind, moment, author, note, body, state, chain = row
            event = cls(number, kind, moment, author, note, json.loads(body), state, chain)
            intact = event.chained(previous) == event.chain
        except (ValueError, TypeError, UnicodeEncodeError, RecursionError) as error:
            raise ArtifactError(f"{where}: event {row[0]} cannot be read ({error}); restore the file") from error
        if not intact:
            raise ArtifactError(
                f"{where}: event {row[0]} or one before it was changed since it was written; restore the file from a "
                "copy"
            )
        return event


def digest_of_state(base: str, active: Sequence[str]) -> str:
    """Return the short digest of the edits in effect, in order, on a base.

    Args:
        base: digest of the base's weights.
        active: ids of the edits.
    """
    return hashlib.sha256("\n".join([base, *active]).encode()).hexdigest()[:16]


def facts_of(edit: Edit) -> tuple[dict[str, str], ...]:
    """Return what an edit was asked for, as an entry keeps it."""
    return tuple({"id": r.id, "prompt": r.text, "target": r.target} for r in edit.requests)
