"""Reading a ledger's events in order: which edits there are, which are in effect, and which were planned with which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kecore.api.errors import ArtifactError
from kecore_serve.records import Entry, Event

__all__ = ["History"]


@dataclass
class History:
    """All events up to one of them, and what follows from them.

    Args:
        events: the events, in order.
        entries: every edit that was ever appended, by id, in order.
        active: ids of the edits in effect, in order.
        spans: by id, the events between which an edit was in effect: ``[from, to)``, with None for "until now".
        tags: by name, the number of the event before which the tag was given.
    """

    events: list[Event] = field(default_factory=list[Event])
    entries: dict[str, Entry] = field(default_factory=dict[str, Entry])
    active: list[str] = field(default_factory=list[str])
    spans: dict[str, list[list[int | None]]] = field(default_factory=dict[str, list[list[int | None]]])
    tags: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def number(self) -> int:
        """Number of the last event; 0 before the first."""
        return len(self.events)

    @property
    def chain(self) -> str:
        """The chain so far."""
        return self.events[-1].chain if self.events else ""

    def add(self, event: Event) -> None:
        """Take in the next event."""
        for values in event.body.get("edits", ()):
            entry = Entry.of(event, values)
            self.entries[entry.id] = entry
        for id_, scores in event.body.get("scores", {}).items():
            self.entries[id_] = replace(self.entries[id_], scores=scores)
        if "tag" in event.body:
            self.tags[event.body["tag"]] = event.body["to"]
        after = self.active_after(event)
        for id_ in self.active:
            if id_ not in after:
                self.spans[id_][-1][1] = event.number
        for id_ in after:
            if id_ not in self.active:
                self.spans.setdefault(id_, []).append([event.number, None])
        self.active = after
        self.events.append(event)

    def active_after(self, event: Event) -> list[str]:
        """Return the ids in effect after an event that follows those taken in so far."""
        body = event.body
        if event.kind == "checkout":
            return list(body["active"])
        removed = set(body.get("removed", ()))
        return [id_ for id_ in self.active if id_ not in removed] + list(body.get("added", ()))

    def active_at(self, number: int) -> list[str]:
        """Return the ids that were in effect after the event of a number, in order."""
        past = History()
        for event in self.events[:number]:
            past.active = past.active_after(event)
        return past.active

    def was_active(self, id_: str, number: int) -> bool:
        """Return whether an edit was in effect after the event of a number."""
        for begin, end in self.spans.get(id_, ()):
            if begin is not None and begin <= number and (end is None or number < end):
                return True
        return False

    def planned_with(self, id_: str) -> list[str]:
        """Return the edits in effect that were planned while this one was, in order."""
        later: list[str] = []
        for other in self.active:
            planned_after = self.entries[other].planned_after
            if other != id_ and planned_after is not None and self.was_active(id_, planned_after):
                later.append(other)
        return later

    def find(self, beginning: str, where: str) -> Entry:
        """Return the one edit whose id begins so.

        Raises:
            ArtifactError: there is none, or more than one.
        """
        matches = [id_ for id_ in self.entries if beginning and id_.startswith(beginning)]
        if beginning in self.entries:
            matches = [beginning]
        if len(matches) == 1:
            return self.entries[matches[0]]
        if not matches:
            raise ArtifactError(f"{where} has no edit {beginning!r}; `kecore log {where}` lists their ids")
        raise ArtifactError(
            f"{beginning!r} is the beginning of {len(matches)} ids in {where}: {', '.join(matches[:5])}; "
            "give more of it"
        )

    def resolve(self, name: str, where: str) -> int:
        """Return the number of the event that a name means.

        Args:
            name: ``head``, ``base``, a tag, the beginning of a state or of an edit's id: the moment after it came.
            where: the ledger, for messages.

        Raises:
            ArtifactError: it means nothing here, or more than one thing.
        """
        if name == "head":
            return self.number
        if name == "base":
            return 0
        if name in self.tags:
            return self.tags[name]
        states = _states_beginning(self.events, name)
        if len(states) == 1:
            return states[0]
        if len(states) > 1:
            raise ArtifactError(f"{name!r} is the beginning of {len(states)} states in {where}; give more of it")
        try:
            return self.find(name, where).event
        except ArtifactError as error:
            raise ArtifactError(
                f"{where} has no tag, state or edit {name!r}, or more than one; tags: "
                f"{', '.join(self.tags) or 'none yet'}; `kecore log {where}` lists states and edits"
            ) from error


def _states_beginning(events: Sequence[Event], name: str) -> list[int]:
    """Return, for each state whose digest begins so, the number of the first event that gave it."""
    first: dict[str, int] = {}
    for event in events:
        if len(name) >= 4 and event.state.startswith(name):
            first.setdefault(event.state, event.number)
    return list(first.values())
