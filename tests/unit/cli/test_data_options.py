"""How a data set is read is said by the same options in every command that takes one, and the loader hears of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kecore import data, models

Run = Callable[..., Any]
FACTS = data.path("counterfact_sample.jsonl")
COMMANDS = {
    "edit": ("edit", "demo", "--out", "out", "--facts"),
    "eval": ("eval", "demo", "--facts"),
    "compare": ("compare", "demo", "--methods", "ft-m", "--out", "out", "--facts"),
    "bench": ("bench", "store.sqlite", "--model", "demo", "--methods", "ft-m", "--facts"),
    "train": ("train", "mend", "demo", "--out", "out", "--data"),
    "trace": ("trace", "demo", "--facts"),
    "check": ("check",),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where commands write, and no model to load."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--format", "xyz", "no data set layout 'xyz'"),
        ("--split", "test", "split 'test' was asked of the single file"),
        ("--variant", "unstructured", "has no variants, got 'unstructured'"),
        ("--sha256", "0" * 12, "expected SHA-256 000000000000"),
        ("--map", "prompt=ask,target=say", "the map names 'ask', which is not there"),
    ],
)
def test_the_loader_hears(kecore: Run, command: str, option: str, value: str, message: str) -> None:
    done = kecore(*COMMANDS[command], FACTS, option, value)
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.split())


def test_bench_needs_to_know_of_which_data_set(kecore: Run) -> None:
    words = COMMANDS["bench"]
    for given, message in (
        ((*words, FACTS, "--facts", FACTS, "--sha256", "0" * 12), "--sha256 is of one data set"),
        ((*words[:-1], "--split", "test"), "--split is of --facts"),
    ):
        done = kecore(*given)
        assert done.exit_code == 2
        assert message in " ".join(done.output.split())


@pytest.mark.parametrize("command", ["compare", "bench"])
def test_a_run_that_cannot_begin_leaves_no_store(kecore: Run, tmp_path: Path, command: str) -> None:
    words = [word if word != "ft-m" else "nope" for word in COMMANDS[command]]
    done = kecore(*words, FACTS)
    assert "no method 'nope'" in done.stderr
    assert not list(tmp_path.iterdir())
