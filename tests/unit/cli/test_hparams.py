"""``--hparams``: what is refused before anything is loaded, and what is shown of a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kecore import models
from kecore.api.errors import ConfigError
from kecore_bench.commands.options import method_entries
from kecore_bench.plan import MethodEntry

Run = Callable[..., Any]
FACT = ("--prompt", "Paris is in", "--subject", "Paris", "--target", "Rome")


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a model would be loaded."""

    def load(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(models, "load_model", load)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    values = {"alg_name": "FT", "layers": [2], "num_steps": 7, "lr": 5e-4, "max_length": 40, "device": 0, "mine": 1}
    path = tmp_path / "ft.json"
    path.write_text(json.dumps(values))
    return path


def test_a_file_names_the_method_and_is_shown(kecore: Run, tmp_path: Path, file: Path) -> None:
    """The bad field that ends the command is one of the file's method, so the method was taken from the file."""
    done = kecore("edit", "demo", "--out", tmp_path / "out", *FACT, "--hparams", file, "--set", "depths=3")
    assert done.exit_code == 2
    assert "unknown key 'depths'; did you mean 'depth'?" in " ".join(done.stderr.split())
    shown = " ".join(done.stdout.split())
    assert "FT, here ft-l" in shown
    assert "num_steps=7 steps=7" in shown
    assert "max_length=40 otherwise differs: texts are not cut" in shown
    assert "said elsewhere: device (--device)" in shown
    assert "no key of FT that is known: mine" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--preset", "gpt2-xl"), "give --preset or --hparams"),
        (("--method", "memit"), "is for 'FT', which is ft-l, not for 'memit'"),
    ],
)
def test_what_cannot_stand_beside_a_file_is_refused(
    kecore: Run, tmp_path: Path, file: Path, words: tuple[str, ...], said: str
) -> None:
    done = kecore("edit", "demo", "--out", tmp_path / "out", *FACT, "--hparams", file, *words)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_plan_takes_a_file(file: Path) -> None:
    entry = MethodEntry.model_validate({"hparams": str(file), "set": {"steps": 9}})
    assert (entry.name, entry.title) == ("ft-l", "ft-l ft.json steps=9")
    assert (entry.fields["layer"], entry.fields["steps"]) == (2, 9)
    with pytest.raises(ValueError, match="has a preset and a file of hparams"):
        MethodEntry.model_validate({"hparams": str(file), "preset": "gpt2-xl"})
    assert method_entries(["ft-l"], None, None, [f"ft-l={file}"])[0]["hparams"] == str(file)
    with pytest.raises(ConfigError, match="--hparams of 'ft-l' is given twice"):
        method_entries(["ft-l"], None, None, [f"ft-l={file}"] * 2)
