"""``kecore train`` and what takes its result, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kecore import models
from kecore.testing import tiny_model, tiny_tokenizer

Run = Callable[..., Any]
SHORT = ("--steps", 2, "--batch-size", 2, "--held-out", 2, "--set", "layers=[1,3]", "--set", "rank=4")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model under any name."""

    def load(ref: str, **_: object) -> models.LoadedModel:
        model: Any = tiny_model("llama")
        return models.LoadedModel(model, tiny_tokenizer(), ref, ref)

    monkeypatch.setattr(models, "load_model", load)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {
            "prompt": "The city of {} is",
            "subject": f"land {i}",
            "target": "Rome",
            "rephrases": [f"land {i} has"],
            "locality": {"unrelated": [{"prompt": f"The tower {i} is in", "answers": ["Paris"]}]},
        }
        for i in range(8)
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_train_inspect_edit(kecore: Run, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "trained"
    done = kecore("train", "mend", "m", "--data", data, "--out", out, *SHORT, "--json")
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["record"]["schedule"]["steps"] == 2
    assert [point["step"] for point in said["record"]["curve"]] == [0, 2]
    assert "step 2: loss" in done.stderr
    seen = json.loads(kecore("inspect", out, "--json").stdout)
    assert seen["kind"] == "trained-editor"
    assert seen["config"]["rank"] == 4
    assert "held-out records" in kecore("inspect", out).stdout
    again = kecore("train", "mend", "m", "--data", data, "--out", out, *SHORT)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    words = ("--method", "mend", "--facts", data, "--limit", 2, "--out", tmp_path / "edit", "--no-evaluate")
    edited = kecore("edit", "m", *words, "--trained", out, "--json")
    assert edited.exit_code == 0, edited.stderr
    assert json.loads(edited.stdout)["config"]["rank"] == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", "memit", "m", "--data", "{data}"), "'memit' needs no training"),
        (("train", "mend", "m", "--data", "{data}", "--set", "rnk=4"), "unknown key 'rnk'"),
        (("train", "mend", "m", "--data", "{data}", "--held-out", 8), "too few to hold out 8"),
        (("edit", "m", "--method", "mend", "--facts", "{data}"), "`kecore train mend MODEL --data FILE"),
        (("edit", "m", "--method", "mend", "--facts", "{data}", "--trained", "{data}"), "not a safetensors file"),
    ],
)
def test_bad_input_is_refused(kecore: Run, data: Path, tmp_path: Path, words: tuple[Any, ...], said: str) -> None:
    given = [str(word).format(data=data) for word in words]
    done = kecore(*given, "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "out" / "trained.safetensors").exists()
