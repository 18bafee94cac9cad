"""Bad input that is refused before a model is loaded: nothing is written, and the message names the culprit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kecore import models
from kecore.api.errors import MissingDependencyError

Run = Callable[..., Any]
FACT = ("--prompt", "Paris is in", "--subject", "Paris", "--target", "Rome")
GOOD = {"prompt": "{} is in", "subject": "Paris", "target": "Rome"}


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a model would be loaded."""

    def load(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(models, "load_model", load)


def refused(kecore: Run, tmp_path: Path, *words: object) -> str:
    """What an edit that must not happen says."""
    before = sorted(tmp_path.rglob("*"))
    done = kecore("edit", "demo", "--out", tmp_path / "out", *words)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before
    return " ".join(done.stderr.split())


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--prompt", "Paris is in", "--subject", "Oslo", "--target", "Rome"), "'Oslo' is not in the prompt"),
        (("--prompt", "Paris is in", "--subject", "Paris", "--target", " "), "the target is empty"),
        (("--prompt", "Paris is in", "--subject", "Paris"), "needs --target too"),
        (("--prompt", "x"), "needs --subject, --target too"),
        ((), "no facts: give --facts FILE"),
        ((*FACT, "--limit", "3"), "--limit goes with --facts"),
        ((*FACT, "--format", "zsre"), "--format goes with --facts"),
        ((*FACT, "--split", "test"), "--split goes with --facts"),
        ((*FACT, "--facts", "x"), "not --facts and --prompt"),
        ((*FACT, "--method", "memti"), "did you mean 'memit'"),
        ((*FACT, "--set", "stepps=3"), "unknown key 'stepps'; did you mean 'steps'? known: "),
        ((*FACT, "--set", "steps=none"), "'steps': "),
        ((*FACT, "--set", "steps"), "--set takes key=value"),
        ((*FACT, "--preset", "gpt-9"), "unknown preset 'gpt-9'; known: "),
        ((*FACT, "--memory", "much"), "--memory must be a size"),
        ((*FACT, "--stats", "x", "--text", "y"), "leave out --text and --tokens, or --stats"),
        ((*FACT, "--stats", "nowhere"), "key statistics nowhere: no such file or directory"),
        ((*FACT, "--text", "nowhere.txt"), "nowhere.txt: no such text file"),
        ((*FACT, "--seed", "-1"), "--seed"),
        (("--facts", "nowhere.jsonl"), "nowhere.jsonl: cannot be read"),
    ],
)
def test_refused(kecore: Run, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    assert said in refused(kecore, tmp_path, *words)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ((GOOD, {**GOOD, "subject": "Oslo", "target": {}}), "facts.jsonl line 2: field 'target' must be a text"),
        ((GOOD, "{"), "facts.jsonl line 2: not JSON"),
        ((GOOD, {**GOOD, "prompt": "Rome"}), "facts.jsonl line 2: the subject 'Paris' is not in the prompt"),
        ((GOOD, {**GOOD, "target": "Lyon"}), "contradict each other"),
        (({"a": 1},), "unknown layout, its first record has: a"),
    ],
)
def test_bad_line(kecore: Run, tmp_path: Path, rows: tuple[object, ...], said: str) -> None:
    assert said in refused(kecore, tmp_path, "--facts", lines(tmp_path / "facts.jsonl", *rows))


def test_several_facts_of_a_method_that_takes_one(kecore: Run, tmp_path: Path) -> None:
    facts = lines(tmp_path / "facts.jsonl", GOOD, {**GOOD, "subject": "Oslo"})
    assert "'kn' takes one request at a time and 2 came" in refused(
        kecore, tmp_path, "--facts", facts, "--method", "kn"
    )


@pytest.mark.parametrize(
    ("method", "package", "extra"),
    [
        ("lora", "peft", "lora"),
        ("adalora", "peft", "lora"),
        ("dpo", "peft", "lora"),
        ("qlora", "peft", "lora"),
        ("qlora", "bitsandbytes", "qlora"),
    ],
)
def test_a_missing_package(
    kecore: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install 'kecore[{extra}]'" in refused(kecore, tmp_path, *FACT, "--method", method)


@pytest.mark.parametrize("method", ["retrieval", "mello"])
def test_a_missing_sentence_encoder(kecore: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    from kecore_methods.prompt import encoders

    monkeypatch.setattr(encoders, "load_encoder", _no_encoder)
    encoders._load_pooled.cache_clear()
    assert "no encoder here" in refused(kecore, tmp_path, *FACT, "--method", method)


def _no_encoder(_name: str) -> None:
    raise MissingDependencyError("no encoder here")


def test_unknown_format(kecore: Run, tmp_path: Path) -> None:
    facts = lines(tmp_path / "facts.jsonl", GOOD)
    assert "no data set layout 'xyz'; installed: " in refused(kecore, tmp_path, "--facts", facts, "--format", "xyz")


def test_an_edit_is_not_overwritten(kecore: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "edit.safetensors").write_bytes(b"precious")
    assert "overwrite it with --force" in refused(kecore, tmp_path, *FACT)
    assert (tmp_path / "out" / "edit.safetensors").read_bytes() == b"precious"


def test_out_may_not_be_a_file(kecore: Run, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    assert "is a file; name a directory" in refused(kecore, tmp_path, *FACT)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("attach", "demo", "nowhere", "--out", "{out}"), "nowhere: no such file"),
        (("attach", "demo", "{file}", "--out", "{out}"), "truncated or not a safetensors file"),
        (("attach", "demo", "{file}", "--out", "{full}"), "exists and is not empty"),
        (("revert", "{full}", "--out", "{out}"), "carries no record of edits"),
        (("inspect", "{file}"), "truncated or not a safetensors file"),
        (("inspect", "{full}"), "holds no edit, no key statistics and no record of edits"),
        (("inspect", "nowhere"), "no such file or directory"),
        (("stats", "demo", "--text", "nowhere.txt", "--out", "{out}"), "no such text file"),
        (("stats", "demo", "--text", "{file}", "--layers", "x", "--out", "{out}"), "--layers must be auto"),
    ],
)
def test_other_commands(kecore: Run, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("not an edit")
    places = {name: str(tmp_path / path) for name, path in (("out", "out"), ("full", "full"), ("file", "full/file"))}
    done = kecore(*(word.format(**places) for word in words))
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("edit", "demo", *FACT, "--out"),
        ("demo", "--out"),
        ("attach", "demo", "nowhere", "--out"),
        ("revert", "nowhere", "--out"),
        ("export", "nowhere", "--out"),
        ("stats", "demo", "--text", "{sample}", "--out"),
        ("train", "mend", "demo", "--data", "{sample}", "--out"),
        ("report", "nowhere.sqlite", "--out"),
        ("import-triples", "{sample}", "--out"),
        ("check", "{sample}", "--fix"),
    ],
    ids=lambda words: words[0],
)
def test_a_place_that_cannot_be_written(kecore: Run, tmp_path: Path, words: tuple[str, ...]) -> None:
    sample = lines(tmp_path / "sample.jsonl", GOOD)
    long_name = tmp_path / ("x" * 300)
    for place in (Path("/proc/kecore/out"), long_name, long_name / "out", sample / "out"):
        done = kecore(*(word.format(sample=sample) for word in words), place)
        assert done.exit_code == 1, done.output
        assert f"{place} cannot be written: " in done.stderr
    assert list(tmp_path.iterdir()) == [sample]


def test_a_broken_record_of_edits(kecore: Run, tmp_path: Path) -> None:
    (tmp_path / "kecore").mkdir()
    (tmp_path / "kecore" / "attached.json").write_text('{"format": 1}')
    done = kecore("inspect", tmp_path)
    assert done.exit_code == 2
    assert "truncated or not kecore's" in done.stderr
