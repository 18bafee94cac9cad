"""Checkpoints that carry edits, from Python: written by a session or from files, and brought back bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kecore import Editor, EditRequest, load_model, save_model
from kecore.api.errors import ArtifactError, EditStateError, RequestConflictError
from kecore.checkpoint import attach_edits, read_record, take_off_edits
from kecore.edit import attached, load_edit
from kecore.testing import tiny_model, tiny_tokenizer

PARIS = EditRequest("{} is in the city of", "The tower", "Rome", "Paris")
COOK = EditRequest("The mother tongue of {} is", "Anna", "French", "English")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "base")


@pytest.fixture
def editor(base: Path) -> Editor:
    return Editor.from_pretrained(str(base), device="cpu", statistics=None)


def same_weights(first: Path, second: Path) -> bool:
    weights, others = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_session_writes_what_gives_the_base_back(base: Path, editor: Editor, tmp_path: Path) -> None:
    editor.edit(PARIS, "ft-m", steps=3)
    editor.edit(COOK, "ft-m", steps=3)
    written = editor.save_checkpoint(tmp_path / "edited")
    assert (written.model, [edit["method"] for edit in written.edits]) == (str(base), ["ft-m", "ft-m"])
    assert not same_weights(tmp_path / "edited", base)
    edited = load_model(str(tmp_path / "edited")).model
    for name, parameter in edited.named_parameters():
        assert torch.equal(parameter, dict(editor.model.named_parameters())[name]), name
    take_off_edits(load_model(str(tmp_path / "edited")), tmp_path / "again")
    assert same_weights(tmp_path / "again", base)
    assert read_record(tmp_path / "again") is None


def test_files_and_a_session_give_the_same_checkpoint(base: Path, editor: Editor, tmp_path: Path) -> None:
    editor.edit(PARIS, "ft-m", steps=3).save(tmp_path / "edit")
    by_session = editor.save_checkpoint(tmp_path / "by-session", ref="the base")
    by_files = attach_edits(load_model(str(base)), [tmp_path / "edit"], tmp_path / "by-files")
    assert same_weights(tmp_path / "by-session", tmp_path / "by-files")
    assert by_session.parameters == by_files.parameters != ()
    assert (by_session.base, by_session.edited) == (by_files.base, by_files.edited)
    assert (by_session.model, by_files.model) == ("the base", str(base))
    assert by_files.edits[0]["source"] == str(tmp_path / "edit")


def test_one_of_two_edits_is_taken_off(editor: Editor, tmp_path: Path) -> None:
    editor.edit(PARIS, "ft-m", steps=3)
    editor.save_checkpoint(tmp_path / "one")
    editor.edit(COOK, "ft-m", steps=3)
    editor.save_checkpoint(tmp_path / "both")
    loaded = load_model(str(tmp_path / "both"))
    with pytest.raises(ArtifactError, match="edits 1 to 2, there is no edit 3"):
        take_off_edits(loaded, tmp_path / "x", [3])
    written = take_off_edits(loaded, tmp_path / "left", [2])
    assert len(written.edits) == 1
    assert same_weights(tmp_path / "left", tmp_path / "one")


def test_an_edit_is_attached_once(base: Path, editor: Editor, tmp_path: Path) -> None:
    edit = editor.edit(PARIS, "ft-m", steps=3)
    edit.save(tmp_path / "edit")
    editor.revert()
    once = tmp_path / "once"
    attach_edits(load_model(str(base)), [tmp_path / "edit"], once)
    for model, edits in ((base, [tmp_path / "edit", tmp_path / "edit"]), (once, [tmp_path / "edit"])):
        with pytest.raises(EditStateError, match=r"is the same edit as .*; give it once"):
            attach_edits(load_model(str(model)), edits, tmp_path / "twice")
    copy = load_edit(tmp_path / "edit")
    edit.attach(editor.model)
    with pytest.raises(EditStateError, match="attached to the model already"):
        copy.attach(editor.model)
    edit.revert(editor.model)
    assert not (tmp_path / "twice").exists()


def test_edits_that_contradict_are_attached_only_where_the_later_was_planned_on_the_earlier(
    base: Path, editor: Editor, tmp_path: Path
) -> None:
    other = replace(PARIS, target="Danube")
    editor.edit(PARIS, "ft-m", steps=3).save(tmp_path / "day-1")
    editor.revert()
    editor.edit(other, "ft-m", steps=3).save(tmp_path / "day-2")
    editor.revert()
    with pytest.raises(RequestConflictError, match="planned on one base, and together they would write neither"):
        attach_edits(load_model(str(base)), [tmp_path / "day-1", tmp_path / "day-2"], tmp_path / "both")
    attach_edits(load_model(str(base)), [tmp_path / "day-1"], tmp_path / "first")
    with pytest.raises(RequestConflictError, match="cannot continue with both"):
        attach_edits(load_model(str(tmp_path / "first")), [tmp_path / "day-2"], tmp_path / "both")
    loaded = load_model(str(tmp_path / "first"))
    with Editor(loaded.model, loaded.tokenizer) as corrected:
        corrected.edit(other, "ft-m", steps=3).save(tmp_path / "correction")
    written = attach_edits(load_model(str(tmp_path / "first")), [tmp_path / "correction"], tmp_path / "both")
    assert [edit["id"] for edit in written.edits] == [load_edit(tmp_path / name).id for name in ("day-1", "correction")]


def test_day_one_is_taken_off_by_its_id_from_what_was_made_on_it(base: Path, editor: Editor, tmp_path: Path) -> None:
    editor.edit(PARIS, "ft-m", steps=3).save(tmp_path / "day-1")
    attach_edits(load_model(str(base)), [tmp_path / "day-1"], tmp_path / "prod-1")
    loaded = load_model(str(tmp_path / "prod-1"))
    with Editor(loaded.model, loaded.tokenizer, statistics=None) as second:
        second.edit(COOK, "ft-m", steps=3).save(tmp_path / "day-2")
    written = attach_edits(load_model(str(tmp_path / "prod-1")), [tmp_path / "day-2"], tmp_path / "prod-2")
    first_id, second_id = (edit["id"] for edit in written.edits)
    assert written.model == str(base)
    record = read_record(tmp_path / "prod-2")
    assert record is not None
    assert record.numbers_of([first_id[:5]]) == [1]
    with pytest.raises(ArtifactError, match="carries no edit of id 'xyz'"):
        record.numbers_of(["xyz"])
    left = take_off_edits(load_model(str(tmp_path / "prod-2")), tmp_path / "prod-3", record.numbers_of([first_id]))
    assert [edit["id"] for edit in left.edits] == [second_id]
    take_off_edits(load_model(str(tmp_path / "prod-3")), tmp_path / "none")
    assert same_weights(tmp_path / "none", base)
    take_off_edits(load_model(str(tmp_path / "prod-2")), tmp_path / "first", record.numbers_of([second_id]))
    assert same_weights(tmp_path / "first", tmp_path / "prod-1")


def test_an_edit_that_was_planned_with_another_may_contradict_it(base: Path, editor: Editor, tmp_path: Path) -> None:
    editor.edit(PARIS, "ft-m", steps=3).save(tmp_path / "day-1")
    editor.edit(replace(PARIS, target="Danube"), "ft-m", steps=3).save(tmp_path / "day-2")
    written = attach_edits(load_model(str(base)), [tmp_path / "day-1", tmp_path / "day-2"], tmp_path / "both")
    assert len(written.edits) == 2
    for name, parameter in load_model(str(tmp_path / "both")).model.named_parameters():
        assert torch.equal(parameter, dict(editor.model.named_parameters())[name]), name


def test_a_session_without_edits_writes_a_plain_checkpoint(base: Path, editor: Editor, tmp_path: Path) -> None:
    assert editor.save_checkpoint(tmp_path / "plain").edits == ()
    assert same_weights(tmp_path / "plain", base)
    assert not (tmp_path / "plain" / "kecore").exists()


def test_what_cannot_be_written_or_taken_off_is_refused(base: Path, editor: Editor, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="exists and is not empty"):
        editor.save_checkpoint(base)
    with pytest.raises(ArtifactError, match="carries no record of edits"):
        take_off_edits(load_model(str(base)), tmp_path / "x")
    editor.edit(PARIS, "grace", steps=2)
    with pytest.raises(ArtifactError, match="edit 1: an edit of method 'grace' leaves the weights alone"):
        editor.save_checkpoint(tmp_path / "x")
    assert attached(editor.model) != ()
    assert not (tmp_path / "x").exists()
