"""How options of several methods become entries of a plan, and what a command that cannot begin leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kecore.api.errors import ConfigError
from kecore.cli import app
from kecore.evaluate.protocol import Protocol
from kecore_bench.commands.options import method_entries
from kecore_bench.store import RunSpec, Store


def test_settings_of_methods() -> None:
    pairs = ["memit.steps=3", "MEMIT + blue.gain=0.5", "memit.layers=[4]"]
    assert method_entries(["memit", "memit+blue"], ["memit=gpt-j"], pairs) == [
        {"name": "memit", "preset": "gpt-j", "set": {"steps": 3, "layers": [4]}},
        {"name": "memit+blue", "preset": None, "set": {"gain": 0.5}},
    ]
    assert method_entries(["memit"], None, None) == [{"name": "memit", "preset": None, "set": {}}]


@pytest.mark.parametrize(
    ("presets", "pairs", "said"),
    [
        ([], ["gain=0.5"], r"--set takes METHOD.KEY=VALUE, METHOD one of 'memit' \(--methods\); got 'gain=0.5'"),
        ([], ["rome.gain=1"], "one of 'memit'"),
        ([], ["memit.gain"], "key=value"),
        ([], ["memit.gain=1", "memit.gain=2"], "gain is given twice"),
        (["gpt-j"], [], "--preset takes METHOD=NAME, METHOD one of 'memit'"),
        (["memit="], [], "--preset takes METHOD=NAME"),
        (["memit=gpt-j", "memit=gpt-j"], [], "--preset of 'memit' is given twice"),
    ],
)
def test_bad_settings_of_methods(presets: list[str], pairs: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        method_entries(["memit"], presets, pairs)


@pytest.mark.parametrize("options", [[], ["--model", "demo"], ["--facts", "facts.jsonl"]])
def test_a_bench_of_nothing_says_what_to_give(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["bench", "x.sqlite", *options])
    assert done.exit_code == 2
    assert "give --model and --facts (and --methods), or --plan FILE" in " ".join(done.stderr.split())
    assert len(done.stderr) < 300
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        ["compare", "demo", "--methods", "nope", "--facts", "nope"],
        ["compare", "demo", "--methods", "ft-m", "--facts", "nope", "--out", "a/b"],
        ["bench", "folder/x.sqlite", "--model", "demo", "--methods", "ft-m", "--facts", "nope"],
        ["eval", "nope", "--facts", "nope", "--store", "x.sqlite"],
    ],
)
def test_a_command_that_cannot_begin_leaves_nothing(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "error: " in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_store_stays_where_it_was_before_or_holds_a_run(tmp_path: Path) -> None:
    def fail_in(file: Path, *, begun: bool = False) -> None:
        with Store(file, Protocol()) as store:
            if begun:
                data = {"name": "facts", "sha256": "0", "format": "kecore"}
                store.add_run(RunSpec("m", None, "demo", data, 1), {"versions": {}, "base": {}})
            raise ConfigError("some reason")

    path = tmp_path / "new" / "x.sqlite"
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError):
        fail_in(path, begun=True)
    with pytest.raises(ConfigError):
        fail_in(path)
    with pytest.raises(ConfigError):
        fail_in(tmp_path / "mine" / "y.sqlite")
    assert path.is_file()
    assert not list((tmp_path / "mine").iterdir())
