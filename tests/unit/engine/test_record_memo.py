"""What is prepared of a record is kept while there is room."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

from kecore import EditRecord, EditRequest
from kecore.engine.record_memo import RecordMemo


@dataclass(frozen=True)
class Size:
    bytes: int


def record(target: str) -> EditRecord:
    return EditRecord(EditRequest("{} is in", "The tower", target))


class Learner:
    def __init__(self, room: int) -> None:
        self.memo: RecordMemo[Size] = RecordMemo(room)
        self.prepared: list[str] = []

    def prepare(self, one: EditRecord) -> Size:
        self.prepared.append(one.request.target)
        return Size(40)

    def get(self, target: str) -> Size:
        return self.memo.get(record(target), self.prepare)


def test_records_are_prepared_once_up_to_the_budget() -> None:
    learner = Learner(room=100)
    assert learner.get("Rome") is learner.get("Rome")
    learner.get("Paris")
    for _ in range(2):
        learner.get("Lyon")  # a third one has no room
    assert learner.prepared == ["Rome", "Paris", "Lyon", "Lyon"]


def test_a_memo_keeps_no_learner_alive() -> None:
    gc.disable()
    try:
        learner = Learner(room=100)
        learner.get("Rome")
        gone = weakref.ref(learner)
        del learner
        assert gone() is None
    finally:
        gc.enable()
