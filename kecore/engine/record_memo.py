"""Keeps what a training prepared of its records, as long as there is room for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

from kecore.api.types import EditRecord

__all__ = ["Prepared", "RecordMemo"]


class Prepared(Protocol):
    """What was made of a record."""

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        ...


_P = TypeVar("_P", bound=Prepared)


class RecordMemo(Generic[_P]):
    """Prepares each record once, up to a budget.

    A record is prepared alone, so that the result depends on no other. The memo is given what prepares at each call and
    does not keep it: a learner that holds a memo that holds the learner's method would keep its model alive.

    Args:
        room: bytes that may be kept.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._kept: dict[Hashable, _P] = {}

    def get(self, record: EditRecord, prepare: Callable[[EditRecord], _P]) -> _P:
        """Return what was prepared of a record with the same request, rephrases and locality probes, or prepare it."""
        key = (record.request, record.prompts_of("paraphrase"), record.probes_of("locality"))
        if key in self._kept:
            return self._kept[key]
        prepared = prepare(record)
        if prepared.bytes <= self._room:
            self._room -= prepared.bytes
            self._kept[key] = prepared
        return prepared
