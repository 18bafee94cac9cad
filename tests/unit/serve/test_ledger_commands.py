"""The commands of a ledger, from the beginning to a withdrawn edit, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kecore import Editor, EditRequest
from kecore.models import load_model, save_model
from kecore.testing import tiny_model, tiny_tokenizer
from kecore_serve.ledger import Ledger

PARIS = ("--prompt", "The tower is in the city of", "--subject", "The tower", "--target", "Rome")
COOK = ("--prompt", "The mother tongue of Anna is", "--subject", "Anna", "--target", "French")
QUICK = ("--method", "ft-m", "--set", "steps=20", "--device", "cpu")

Result = Callable[..., Any]


@pytest.fixture
def result(kecore: Callable[..., Any]) -> Result:
    """Runs a command that has to end with a code, and returns its JSON."""

    def run(*words: object, code: int = 0) -> Any:
        done = kecore(*words, "--json")
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)

    return run


def test_a_model_is_kept_current(result: Result, kecore: Callable[..., Any], tmp_path: Path) -> None:
    base, folder = save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "base"), tmp_path / "prod"
    began = result("ledger", "init", base, folder, "--device", "cpu")
    first = result("edit", "--ledger", folder, *PARIS, *QUICK)
    assert first["edit_path"] == str(folder / "edits" / f"{first['edit_id']}.safetensors")
    assert result("tag", folder, "day-1")["state"] == first["state"]
    second = result("edit", "--ledger", folder, *COOK, *QUICK, "--no-evaluate", "--out", tmp_path / "out")
    assert (tmp_path / "out" / "edit.safetensors").is_file()

    log = result("log", folder)
    assert [event["kind"] for event in log["events"]] == ["append", "scores", "tag", "append"]
    assert [entry["id"] for entry in log["entries"]] == [first["edit_id"], second["edit_id"]]
    assert log["entries"][0]["scores"] == first["scores"]
    shown = kecore("log", folder).stdout
    assert first["edit_id"] in shown
    assert "tag day-1" in shown

    difference = result("diff", folder, "day-1")
    assert [entry["id"] for entry in difference["only_second"]] == [second["edit_id"]]
    replayed = result("replay", folder, "--device", "cpu", "--out", tmp_path / "checkpoint")
    assert result("replay", folder, "--device", "cpu")["weights"] == replayed["weights"]
    load_model(str(tmp_path / "checkpoint"))

    gone = result("revert", folder, first["edit_id"][:6], "--device", "cpu")
    assert gone["taken_off"] == [first["edit_id"]]
    assert list(gone["replaced"]) == [second["edit_id"]]  # day two was planned with day one, and stays
    assert result("checkout", folder, "day-1")["state"] == first["state"]
    assert result("revert", folder, first["edit_id"], "--keep-later")["state"] == began["state"]
    assert result("verify", folder, "--device", "cpu")["problems"] == []
    assert result("revert", folder, first["edit_id"], code=2)["error"]["type"] == "EditStateError"
    assert result("edit", *PARIS, code=2)["error"]["message"].startswith("no model")


def test_verify_finds_damage_and_facts_that_do_not_hold(result: Result, tmp_path: Path) -> None:
    base, folder = save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "base"), tmp_path / "prod"
    result("ledger", "init", base, folder, "--device", "cpu")
    result("edit", "--ledger", folder, *PARIS, *QUICK[:2], "--set", "steps=1", "--device", "cpu", "--no-evaluate")
    (folder / "edits" / "stray.part").write_bytes(b"")
    found = result("verify", folder, "--device", "cpu", code=1)
    assert (found["facts"], len(found["failed"]), found["problems"]) == (1, 1, [])
    assert found["leftovers"] == [str(folder / "edits" / "stray.part")]
    path = folder / Ledger.open(folder).entries()[0].file
    path.write_bytes(path.read_bytes()[:-1])
    damaged = result("verify", folder, "--files", code=1)
    assert "was changed" in damaged["problems"][0]["message"]


def test_an_edit_with_an_earlier_one_goes_where_a_session_would(result: Result, tmp_path: Path) -> None:
    base = save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "base")
    rival = (*PARIS[:-1], "Danube")
    first = result("edit", base, *PARIS, *QUICK, "--no-evaluate", "--out", tmp_path / "day-1")
    second = result(
        "edit", base, "--with", tmp_path / "day-1", *rival, *QUICK, "--no-evaluate", "--out", tmp_path / "day-2"
    )
    assert first["base"] == second["base"]
    both = result("attach", base, tmp_path / "day-1", tmp_path / "day-2", "--device", "cpu", "--out", tmp_path / "both")
    assert [edit["id"] for edit in both["edits"]] == [first["edit_id"], second["edit_id"]]
    editor = Editor.from_pretrained(str(base), device="cpu", statistics=None)
    for target in ("Rome", "Danube"):
        request = EditRequest("The tower is in the city of", "The tower", target)
        editor.edit(request, "ft-m", steps=20)
    for name, parameter in load_model(str(tmp_path / "both")).model.named_parameters():
        assert torch.equal(parameter, dict(editor.model.named_parameters())[name]), name
