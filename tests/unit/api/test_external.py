"""A method is used from a file; what is wrong with the file is said by a typed error."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_worlds import make_world

import kecore
from kecore import Editor, EditRequest, load_edit
from kecore.api.errors import PluginError
from kecore.api.external import load_method
from kecore.api.line import MethodLine

HELLO = Path(__file__).resolve().parents[3] / "plugins" / "kecore-hello" / "kecore_hello.py"
FACT = EditRequest("{} is the capital of", "Paris", "Italy")


def test_edit_by_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from besides import Hello as Base\n\n\nclass Mine(Base):\n    name = 'mine'\n")
    (tmp_path / "besides.py").write_bytes(HELLO.read_bytes())
    world = make_world("byte-level", torch.float32)
    editor = Editor(world.view.model, world.encoder.tokenizer, progress=None)
    edit: Any = editor.edit(FACT, f"{file}:Mine", steps=2)
    assert edit.method == "mine"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert edit.notes["method_file"] == {"file": "mine.py", "sha256": digest, "name": "Mine"}
    edit.save(tmp_path / "edit")
    editor.revert()
    loaded = load_edit(tmp_path / "edit")
    loaded.attach(world.view.model)
    assert loaded.notes == edit.notes
    loaded.revert(world.view.model)
    assert MethodLine.of(f"{file}").method is MethodLine.of(f"{file}:Mine").method
    assert kecore.methods(f"{file}:Mine").family.startswith("kecore_method_mine")
    file.write_text(file.read_text().replace("'mine'", "'other'"))
    assert load_method(f"{file}:Mine").name == "other"


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (None, ":Mine", "mine.py cannot be read: No such file"),
        ("import nowhere_to_be_found", ":Mine", "cannot be imported: ModuleNotFoundError: No module named 'nowhere"),
        ("class Mine(:", ":Mine", "cannot be imported: SyntaxError"),
        ("", ":Mine", "has no class 'Mine'; classes with a plan: none"),
        ("class Mine:\n    plan = 1", ":Mien", "has no class 'Mien'; did you mean .*mine.py:Mine?"),
        ("Mine = 3", ":Mine", "must lead to a class, got 3"),
        ("class Mine:\n    plan = 1", ":Mine", "api must be the lowest and highest METHOD_API"),
        ("", "", "has 0 classes with a plan; name one as FILE:CLASS: none"),
        ("class A:\n    plan = 1\nclass B:\n    plan = 1", "", "has 2 classes with a plan; .*mine.py:A, .*mine.py:B"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, content: str | None, name: str, said: str) -> None:
    file = tmp_path / "mine.py"
    if content is not None:
        file.write_text(content)
    with pytest.raises(PluginError, match=said):
        MethodLine.of(f"{file}{name}")
