"""The edits of a session as a list with switches, and the way back through everything that was done to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from kecore.api.errors import EditStateError
from kecore.edit import Edit, acting
from kecore.editor import HistoryEntry

__all__ = ["Item", "Stack", "Timeline"]


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One edit in the list.

    Args:
        entry: the edit, as the session keeps it.
        state: what its method remembered after it.
        on: whether it is on the model.
        source: the file it was read from; empty where it was made here.
    """

    entry: HistoryEntry
    state: Mapping[str, Tensor] = field(repr=False)
    on: bool = True
    source: str = ""

    @property
    def edit(self) -> Edit:
        """The edit."""
        return self.entry.edit

    @property
    def id(self) -> str:
        """Its short name."""
        return self.edit.id


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """The list.

    Args:
        items: the edits, oldest first.
    """

    items: tuple[Item, ...] = ()

    @property
    def on(self) -> list[Item]:
        """The edits that are on the model."""
        return [item for item in self.items if item.on]

    def states(self) -> dict[str, Mapping[str, Tensor]]:
        """Return what each method is to find at its next edit: what it remembered after its last edit that is on."""
        states: dict[str, Mapping[str, Tensor]] = {}
        for item in self.on:
            states[item.entry.method] = item.state
        return states

    def find(self, id: str) -> Item:
        """Return the edit of that name.

        Raises:
            EditStateError: the list has none.
        """
        for item in self.items:
            if item.id == id:
                return item
        raise EditStateError(f"the session has no edit '{id}'; another page may have taken it off, undo brings it back")

    def add(self, item: Item) -> Stack:
        """Return the list with one edit more.

        Raises:
            EditStateError: it is in the list.
        """
        if any(item.edit.is_copy_of(other.edit) for other in self.items):
            raise EditStateError(f"edit '{item.id}' is in the list already; switch it on there")
        return Stack((*self.items, item))

    def switch(self, on: Sequence[str]) -> Stack:
        """Return the list with these edits on and all others off.

        Raises:
            EditStateError: the list has no such edit.
        """
        for id in on:
            self.find(id)
        return Stack(tuple(replace(item, on=item.id in on) for item in self.items))

    def without(self, id: str) -> Stack:
        """Return the list without an edit.

        Raises:
            EditStateError: the list has no such edit.
        """
        dropped = self.find(id)
        return Stack(tuple(item for item in self.items if item is not dropped))

    def superseded(self) -> set[str]:
        """Return the edits that are on and yet do nothing, as a later one holds all that they hold."""
        on = [item.edit for item in self.on]
        active = acting(on)
        return {edit.id for edit in on if not any(edit is other for other in active)}


@dataclass(frozen=True, slots=True)
class Step:
    """A state of the list, and what led to it."""

    label: str
    stack: Stack


class Timeline:
    """The states of the list, for undo and redo."""

    def __init__(self) -> None:
        self._steps = [Step("", Stack())]
        self._position = 0

    @property
    def stack(self) -> Stack:
        """The list as it is now."""
        return self._steps[self._position].stack

    @property
    def undo_label(self) -> str:
        """What undo takes back; empty where there is nothing."""
        return self._steps[self._position].label

    @property
    def redo_label(self) -> str:
        """What redo does again; empty where there is nothing."""
        following = self._steps[self._position + 1 :]
        return following[0].label if following else ""

    def push(self, label: str, stack: Stack) -> None:
        """Go on to another state; what was undone before is forgotten."""
        self._steps = [*self._steps[: self._position + 1], Step(label, stack)]
        self._position += 1

    def look(self, steps: int) -> Stack:
        """Return the state so many steps away.

        Args:
            steps: -1 for the one before, 1 for the one after.

        Raises:
            EditStateError: there is none.
        """
        position = self._position + steps
        if not 0 <= position < len(self._steps):
            raise EditStateError(f"there is nothing to {'undo' if steps < 0 else 'redo'}")
        return self._steps[position].stack

    def move(self, steps: int) -> None:
        """Go to the state so many steps away; see :meth:`look`."""
        self.look(steps)
        self._position += steps
