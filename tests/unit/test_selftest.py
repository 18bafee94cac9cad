"""What `kecore probe MODEL --self-test` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kecore.catalogue import methods
from kecore.cli import app
from kecore.editor import Editor
from kecore.models import save_model
from kecore.selftest import cheapest_methods, try_out
from kecore.testing import Snapshot, tiny_model, tiny_tokenizer


def test_cheapest_methods_need_nothing_where_their_family_has_such() -> None:
    cheapest = cheapest_methods()
    assert set(cheapest) == set(methods().families())
    assert "needs training" not in cheapest["memory"].abilities
    assert cheapest["memory"].name == "grace"
    assert "needs key statistics" not in cheapest["locate"].abilities


def test_each_family_edits_a_model_and_leaves_it_as_it_was() -> None:
    model = tiny_model("t5", family="encoder-decoder")
    before = Snapshot(model)
    trials = try_out(model, tiny_tokenizer("llama-like"))
    assert {trial.family: trial.outcome for trial in trials} == {
        "locate": "works",
        "memory": "works",
        "finetune": "works",
        "prompt": "works",
        "meta": "not tried",
    }
    assert before.differences() == []
    for trial in trials:
        if trial.family in ("locate", "memory", "finetune"):
            assert trial.before is not None
            assert trial.after is not None
            assert trial.after > trial.before
    assert "needs training: kecore train" in trials[-1].reason


def test_failure_is_told_and_taken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama")
    checkpoint = save_model(model, tiny_tokenizer("llama-like"), tmp_path / "model")
    edit = Editor.edit

    def edit_and_break(editor: Editor, *args: Any, **options: Any) -> None:
        edit(editor, *args, **options)
        raise IndexError("out of reach")

    monkeypatch.setattr(Editor, "edit", edit_and_break)
    monkeypatch.setattr("kecore.selftest.cheapest_methods", lambda: {"memory": methods("grace")})
    result = CliRunner().invoke(app, ["probe", str(checkpoint), "--self-test", "--device", "cpu", "--json"])
    assert result.exit_code == 1
    (trial,) = json.loads(result.stdout)["self_test"]
    assert (trial["outcome"], trial["reason"]) == ("fails", "IndexError: out of reach")
