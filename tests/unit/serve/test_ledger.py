"""The ledger: append-only, named by id, safe for two writers, and damage is noticed."""

from __future__ import annotations

import sqlite3
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ledger_edits import fingerprint, new_ledger, random_edit, small_module

from kecore.api.errors import (
    ArtifactError,
    ArtifactMismatchError,
    EditStateError,
    RequestConflictError,
    StoreInUseError,
)
from kecore.api.types import EditRequest
from kecore_serve.ledger import Ledger

BASE = fingerprint(small_module())


def test_what_is_appended_is_there_when_the_ledger_is_opened_again(tmp_path: Path) -> None:
    with new_ledger(tmp_path / "ledger") as ledger:
        empty = ledger.state
        entry = ledger.append(random_edit(BASE, 1), author="Ada", note="first", scores={"strict": 1.0})
    with Ledger.open(tmp_path / "ledger") as again:
        assert again.model == "a small module"
        assert again.base == BASE
        assert again.entries() == again.active() == (entry,)
        assert (entry.author, entry.note, entry.method, entry.seed) == ("Ada", "first", "random", 1)
        assert entry.facts == ({"id": "fact-1", "prompt": "Place 1 is in", "target": "Town 1"},)
        assert entry.scores == {"strict": 1.0}
        loaded = again.load(entry)
        assert loaded.id == entry.id
        assert torch.equal(loaded.updates["0.weight"].U, random_edit(BASE, 1).updates["0.weight"].U)
        assert again.state != empty


def test_the_state_is_told_by_the_edits_in_effect_alone(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path / "ledger")
    states = [ledger.state]
    for number in range(3):
        ledger.append(random_edit(BASE, number), planned_on=ledger.state)
        states.append(ledger.state)
    assert len(set(states)) == 4
    ledger.revert(ledger.active()[-1].id)
    assert ledger.state == states[2]
    assert ledger.checkout("base") == states[0]
    assert ledger.checkout(states[3][:6]) == states[3]
    assert len(ledger.events()) == 6
    assert [event.kind for event in ledger.events()] == ["append"] * 3 + ["revert", "checkout", "checkout"]


def test_day_one_is_taken_back_and_day_two_stays(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path / "ledger")
    first = ledger.append(random_edit(BASE, 1), planned_on=ledger.state)
    second = ledger.append(random_edit(BASE, 2), planned_on=ledger.state)
    withdrawal = ledger.revert(first.id[:5])
    assert withdrawal.ids == (first.id,)
    assert withdrawal.later == (second.id,)
    assert not withdrawal.is_exact
    assert ledger.active() == (second,)
    assert ledger.entries() == (first, second)
    with pytest.raises(EditStateError, match="taken back already"):
        ledger.revert(first.id)
    assert ledger.revert([second.id]).is_exact
    assert ledger.state == ledger.diff("base").first


def test_an_edit_that_was_taken_back_can_come_again(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path / "ledger")
    entry = ledger.append(random_edit(BASE, 1))
    ledger.revert(entry.id)
    assert ledger.append(ledger.load(entry)).id == entry.id
    with pytest.raises(EditStateError, match="in effect"):
        ledger.append(ledger.load(entry))


def test_a_beginning_that_two_ids_share_is_refused(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path / "ledger")
    ids = [ledger.append(random_edit(BASE, number)).id for number in range(20)]
    firsts = [id_[0] for id_ in ids]
    shared = next(first for first in firsts if firsts.count(first) > 1)
    with pytest.raises(ArtifactError, match=r"is the beginning of \d+ ids"):
        ledger.revert(shared)
    with pytest.raises(ArtifactError, match="has no edit 'zzz'"):
        ledger.find("zzz")
    with pytest.raises(ArtifactError, match="has no edit ''"):
        ledger.find("")


def test_tags_name_moments_and_differences_are_between_them(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path / "ledger")
    first = ledger.append(random_edit(BASE, 1))
    ledger.tag("v1")
    second = ledger.append(random_edit(BASE, 2))
    ledger.revert(first.id)
    difference = ledger.diff("v1", "head")
    assert (difference.only_first, difference.only_second, difference.both) == ((first,), (second,), 0)
    with pytest.raises(EditStateError, match="tags do not move"):
        ledger.tag("v1")
    with pytest.raises(ArtifactError, match="tags: v1"):
        ledger.checkout("v2")
    ledger.checkout("v1")
    assert ledger.active() == (first,)
    assert ledger.tags == {"v1": ledger.state}


def test_edits_of_other_weights_and_contradictions_are_refused(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path / "ledger")
    other = fingerprint(
        small_module().apply(lambda module: torch.nn.init.ones_(getattr(module, "weight", torch.ones(1))))
    )
    with pytest.raises(ArtifactMismatchError, match="other weights than this ledger's base"):
        ledger.append(random_edit(other, 1))
    ledger.append(random_edit(BASE, 1))
    rival = replace(random_edit(BASE, 1), created=1.0, requests=(EditRequest("{} is in", "Place 1", "Elsewhere"),))
    with pytest.raises(RequestConflictError, match="planned on the base alone"):
        ledger.append(rival)
    state = ledger.state
    ledger.append(rival, planned_on=state)  # it was planned with the first on the model, and takes its place
    with pytest.raises(EditStateError, match="plan it anew"):
        ledger.append(random_edit(BASE, 3), planned_on=state)
    assert len(ledger.entries()) == 2


def test_two_sessions_on_one_folder_see_each_other_and_lose_nothing(tmp_path: Path) -> None:
    new_ledger(tmp_path / "ledger").close()
    errors: list[BaseException] = []

    def write(begin: int) -> None:
        try:
            with Ledger.open(tmp_path / "ledger") as ledger:
                for number in range(begin, begin + 8):
                    with ledger.writing():
                        ledger.append(random_edit(BASE, number), planned_on=ledger.state)
        except BaseException as error:  # noqa: BLE001 - shown below
            errors.append(error)

    threads = [threading.Thread(target=write, args=(begin,)) for begin in (0, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    ledger = Ledger.open(tmp_path / "ledger")
    assert len(ledger.active()) == 16
    assert sorted(entry.seed for entry in ledger.active()) == [*range(8), *range(100, 108)]


def test_a_writer_that_waits_in_vain_is_told(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path / "ledger")
    other = Ledger.open(tmp_path / "ledger", wait=0.05)
    with ledger.writing(), pytest.raises(StoreInUseError, match="planning an edit"):
        other.append(random_edit(BASE, 1))
    other.append(random_edit(BASE, 1))


def test_method_state_is_kept_as_changes_and_read_bit_for_bit(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path / "ledger")
    states: list[dict[str, torch.Tensor]] = []
    state: dict[str, torch.Tensor] = {}
    for number in range(4):
        state = {**state, f"keys/{number}": torch.randn(6, 2), "count": torch.tensor(number)}
        if number == 2:
            del state["keys/0"]
        states.append(state)
        ledger.append(random_edit(BASE, number, state=state), planned_on=ledger.state)
    for expected in reversed(states):
        read = Ledger.open(tmp_path / "ledger").method_state("random")
        assert read.keys() == expected.keys()
        assert all(torch.equal(read[name], expected[name]) for name in expected)
        ledger.revert(ledger.active()[-1].id)
    assert ledger.method_state("random") == {}
    written = [entry.state.written for entry in ledger.entries()]
    assert sorted(written[3]) == ["count", "keys/3"]


def test_a_state_that_holds_what_was_taken_back_is_not_gone_on_with(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path / "ledger")
    first = ledger.append(random_edit(BASE, 1, state={"a": torch.ones(1)}), planned_on=ledger.state)
    ledger.append(random_edit(BASE, 2, state={"a": torch.ones(1) * 2}), planned_on=ledger.state)
    ledger.revert(first.id)
    with pytest.raises(EditStateError, match=f"remembers in .* includes {first.id}"):
        ledger.method_state("random")


def test_nothing_is_changed_or_deleted_in_the_database(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path / "ledger")
    ledger.append(random_edit(BASE, 1))
    connection = sqlite3.connect(tmp_path / "ledger" / "ledger.sqlite")
    for command in ("DELETE FROM events", "UPDATE events SET note = 'x'"):
        with pytest.raises(sqlite3.IntegrityError, match="only ever added to"):
            connection.execute(command)
    connection.close()


def test_a_changed_event_and_a_changed_file_are_noticed(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path / "ledger")
    entry = ledger.append(random_edit(BASE, 1), note="right")
    path = tmp_path / "ledger" / entry.file
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="was changed; restore it"):
        ledger.load(entry)
    path.unlink()
    with pytest.raises(ArtifactError, match="is missing; restore it"):
        ledger.load(entry)
    ledger.close()
    connection = sqlite3.connect(tmp_path / "ledger" / "ledger.sqlite")
    connection.execute("DROP TRIGGER no_change")
    connection.execute("UPDATE events SET note = 'wrong'")
    connection.commit()
    connection.close()
    with pytest.raises(ArtifactError, match="event 1 or one before it was changed"):
        Ledger.open(tmp_path / "ledger")


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no ledger"):
        Ledger.open(tmp_path)
    (tmp_path / "ledger.sqlite").write_bytes(b"garbage" * 100)
    with pytest.raises(ArtifactError, match="damaged or no ledger"):
        Ledger.open(tmp_path)
    with pytest.raises(ArtifactError, match="not empty"):
        Ledger.create(tmp_path, "x", BASE)
