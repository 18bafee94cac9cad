"""What an edit failed to write is edited again, on top; what does not help is taken off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_worlds import make_world

from kecore import Editor, EditRequest, Protocol, attached, load_edit
from kecore.api.errors import EditStateError, UnsupportedCapabilityError
from kecore.retry import check_retry, retry_failed

FACTS = [
    EditRequest("{} is the capital of", "Paris", "Italy", id="a"),
    EditRequest("{} is in", "Rome", "France", id="b"),
]
PROTOCOL = Protocol(max_new_tokens=0)


@pytest.fixture
def editor() -> Iterator[Editor]:
    world = make_world("byte-level", torch.float32)
    with Editor(world.view.model, world.encoder.tokenizer, progress=None) as session:
        yield session


def weights(editor: Editor) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}


def test_failed_facts_are_written_and_both_edits_are_one_file(editor: Editor, tmp_path: Path) -> None:
    base = weights(editor)
    editor.edit(FACTS[0], "ft-m", steps=60)  # of the two facts, only this one
    retry = retry_failed(editor, FACTS, "ft-m", protocol=PROTOCOL, steps=60)
    values = retry.to_json()
    assert values["failed_before"] == ["b"]
    assert values["tried"] == ["b"]
    assert values["settings"] == {"steps": 120}
    assert retry.kept == (not values["failed_after"])
    assert retry.kept
    edited = weights(editor)
    file = editor.save(tmp_path / "edit")
    editor.revert(2)
    assert all(torch.equal(tensor, base[name]) for name, tensor in weights(editor).items())
    load_edit(file).attach(editor.model)
    for name, tensor in weights(editor).items():
        torch.testing.assert_close(tensor, edited[name], atol=1e-5, rtol=1e-4)
    attached(editor.model)[0].revert(editor.model)


def test_what_does_not_help_is_taken_off(editor: Editor) -> None:
    editor.edit(FACTS, "ft-m", steps=1)
    edited = weights(editor)
    retry = retry_failed(editor, FACTS, "ft-m", protocol=PROTOCOL, steps=1, learning_rate=1e-9)
    assert not retry.kept
    assert retry.evaluation is retry.first
    assert retry.to_json()["failed_after"] == ["a", "b"]
    assert len(editor.history) == 1
    assert all(torch.equal(tensor, edited[name]) for name, tensor in weights(editor).items())


def test_nothing_failed_or_nothing_was_edited(editor: Editor) -> None:
    with pytest.raises(EditStateError, match="nothing was edited yet"):
        retry_failed(editor, FACTS, "ft-m")
    editor.edit(FACTS, "ft-m", steps=100)
    retry = retry_failed(editor, FACTS, "ft-m", protocol=PROTOCOL)
    assert (retry.tried, retry.kept, len(editor.history)) == ((), False, 1)


def test_methods_that_edit_no_edited_model() -> None:
    with pytest.raises(UnsupportedCapabilityError, match="'kn' does not edit a model that is edited"):
        check_retry("kn")
