"""``kecore check``, and ``kecore methods NAME``: what a newcomer asks before an edit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kecore.evaluate import load_records

Run = Callable[..., Any]

FRANCE = {"question": "The capital of France is", "entity": "France", "answer": "Lyon", "ticket": 7}
WHO = {"question": "Who runs the plant?", "answer": "Ann"}


def write(tmp_path: Path, *facts: dict[str, Any]) -> Path:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(facts), encoding="utf-8")
    return path


def test_what_is_read_and_from_where(kecore: Run, tmp_path: Path) -> None:
    done = kecore("check", write(tmp_path, FRANCE, WHO))
    assert done.exit_code == 0
    text = " ".join(done.stdout.split())
    assert "prompt: question, subject: entity, target: answer" in text
    assert "ticket (1)" in text
    assert "The capital of France is France Lyon" in text
    assert "without a subject" in text
    found = json.loads(kecore("check", write(tmp_path, FRANCE, WHO), "--json").stdout)
    assert found["records"] == 2
    assert {doubt["kind"].partition(";")[0]: len(doubt["ids"]) for doubt in found["doubts"]} == {
        "without a subject": 1,
        "without an old answer": 2,
    }
    assert found["methods"]["ft-m"] == ""
    assert "a subject in every fact" in found["methods"]["memit"]
    with_subjects = json.loads(kecore("check", write(tmp_path, FRANCE), "--json").stdout)["methods"]
    assert with_subjects["memit"] == "key statistics (collected by itself)"


def test_facts_that_contradict_each_other_fail(kecore: Run, tmp_path: Path) -> None:
    other = {**FRANCE, "answer": "Nice"}
    done = kecore("check", write(tmp_path, FRANCE, other, FRANCE))
    assert done.exit_code == 1
    assert "error: two targets for one prompt: 'The capital of France is' -> 'Lyon'" in done.stderr
    assert "given more than once" in " ".join(done.stdout.split())


def test_doubtful_subjects(kecore: Run, tmp_path: Path) -> None:
    facts = [
        {"prompt": "Paris, not Paris Hilton, is", "subject": "Paris", "target": "a city"},
        {"prompt": "AcmeSoft is made by", "subject": "Acme", "target": "Ann"},
    ]
    text = " ".join(kecore("check", write(tmp_path, *facts)).stdout.split())
    assert "Paris, not [Paris] Hilton, is" in text
    assert "[Acme]Soft is made by" in text


def test_maps_are_kept_and_facts_written(kecore: Run, tmp_path: Path) -> None:
    path = write(tmp_path, {"who": "Ann", "town": "Rome"})
    fixed = tmp_path / "fixed.jsonl"
    pairs = "prompt=Where does {who} live?,subject=who,target=town"
    assert 'Say which field is which: --map "prompt=FIELD,target=FIELD"' in kecore("check", path).stderr
    assert kecore("check", path, "--map", pairs, "--save-map", "--fix", fixed).exit_code == 0
    (request,) = load_records(fixed).requests
    assert (request.text, request.subject, request.target) == ("Where does Ann live?", "Ann", "Rome")
    assert load_records(path)[0].request == request
    assert f"{fixed} exists" in kecore("check", path, "--fix", fixed).stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--save-map"], "--save-map keeps --map"),
        (["--accept-subjects"], "--accept-subjects needs MODEL"),
        (["--map", "prompt=question", "--save-map", "--split", "x"], "split 'x' was asked of the single file"),
    ],
)
def test_options_that_need_others(kecore: Run, tmp_path: Path, words: list[str], message: str) -> None:
    done = kecore("check", write(tmp_path, FRANCE), *words)
    assert done.exit_code != 0
    assert message in " ".join(f"{done.stderr} {done.exception}".replace("│", " ").split())


def test_facts_without_a_subject_are_refused_before_the_model_is_loaded(kecore: Run, tmp_path: Path) -> None:
    done = kecore("edit", "no-such-model", "--facts", write(tmp_path, FRANCE, WHO), "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "1 of 2 facts name none" in done.stderr
    assert "UnsupportedCapabilityError" in done.stderr
    assert not (tmp_path / "out").exists()


def test_fields_of_one_method(kecore: Run) -> None:
    found = json.loads(kecore("methods", "memit", "--json").stdout)
    fields = {field["name"]: field for field in found["fields"]}
    assert fields["clamp"] == {
        "name": "clamp", "type": "float", "default": 4.0, "bounds": "> 0", "meaning": fields["clamp"]["meaning"]
    }  # fmt: skip
    assert fields["optimizer"]["type"] == "'gradient' or 'adam'"
    assert "gpt-j" in found["presets"]
    shown = kecore("methods", "memit + blue").stdout
    assert "memit + blue" in shown
    assert "--set FIELD=VALUE" in shown
    assert "did you mean 'memit'" in kecore("methods", "memot").stderr
