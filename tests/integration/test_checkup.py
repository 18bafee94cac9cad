"""``kecore checkup`` on tiny models: figures of edits together and apart, of checkpoints, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kecore import models
from kecore.cli import app
from kecore.edit import WeightEdit, load_edit
from kecore.edit.updates import Dense, shape_of
from kecore.model import ModelView
from kecore.testing import tiny_model, tiny_tokenizer
from kecore.text import Encoder
from kecore_analysis.examination import Examination, examine

SHORT = ("--limit", 4, "--window", 20)
FACT = ("--prompt", "The capital of France is", "--subject", "France", "--target", "Rome")
OTHER = ("--prompt", "The Danube flows to", "--subject", "The Danube", "--target", "Berlin")
TASK = [{"sentence": f"The jury {verb}.", "label": i % 2} for i, verb in enumerate(("was", "sat", "left", "ran"))]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KECORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, edits of its weights and of its prompts, and a task set."""
    folder = tmp_path_factory.mktemp("checkup")
    models.save_model(tiny_model("llama", layers=2), tiny_tokenizer(), folder / "tiny")
    always = ("--set", "encoder=model", "--set", "threshold=-1.0", "--set", "named=false")
    for name, words in (
        ("one", (*FACT, "--method", "ft-m", "--set", "steps=2")),
        ("two", (*OTHER, "--method", "ft-l", "--set", "steps=2")),
        ("told", (*FACT, "--method", "retrieval", *always)),
    ):
        done = run("edit", folder / "tiny", *words, "--no-evaluate", "--out", folder / name)
        assert done.exit_code == 0, done.output
    assert f"kecore checkup {folder / 'tiny'} --edit {folder / 'told'}" in done.stdout
    (folder / "cola.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TASK))
    return folder


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def said(*words: object) -> dict[str, Any]:
    done = run(*words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_edits_together_and_apart(folder: Path) -> None:
    edits = ("--edit", folder / "one", "--edit", folder / "two")
    words = ("checkup", folder / "tiny", *SHORT, "--task", folder / "cola.jsonl", "--without", "latency")
    together, apart = said(*words, *edits), said(*words, *edits, "--each")
    (both,), each = together["results"], apart["results"]
    assert [[edit["method"] for edit in result["edits"]] for result in (both, *each)] == [
        ["ft-m", "ft-l"], ["ft-m"], ["ft-l"]
    ]  # fmt: skip
    assert [*both["changes"]] == ["perplexity", "drift", "agreement", "cola"]
    assert together["conditions"] == apart["conditions"]
    assert len({result["changes"]["perplexity"]["after"] for result in (both, *each)}) == 3
    assert len({result["changes"]["perplexity"]["before"] for result in (both, *each)}) == 1
    for result in each:  # what the command prints is what the functions give
        model = models.load_model(str(folder / "tiny"), device="cpu")
        view, encoder = ModelView.of(model.model), Encoder(model.tokenizer)
        examination = Examination.read(tasks=[folder / "cola.jsonl"], limit=4, window=20, without=["latency"])
        edit = load_edit(result["label"])
        wanted = examine(view, encoder, [edit], examination.take(view, encoder), examination).to_json()
        assert result["changes"] == wanted["changes"]
        assert result["matrices"] == wanted["matrices"]
        assert result["latency"] is None


def test_the_result_is_stamped(folder: Path) -> None:
    found = said("checkup", folder / "tiny", "--edit", folder / "one", *SHORT, "--seed", 3, "--without", "latency")
    assert found["conditions"]["perplexity"].items() >= {"passages": 4, "window": 20}.items()
    assert len(found["conditions"]["hash"]) == 12
    assert found["sources"].items() >= {"limit": 4, "seed": 3}.items()
    assert {"kecore", "torch", "transformers"} <= set(found["versions"])
    assert {"load", "read", "before", "after"} <= set(found["stages"])
    assert found["peak_memory_bytes"] > 1 << 20
    assert {"dtype": found["dtype"], **found["base"]} == found["results"][0]["edits"][0]["base"]
    assert found["hardware"]["device"] == found["device"]


def test_for_people(folder: Path) -> None:
    words = ("--edit", folder / "one", "--task", f"cola={folder / 'cola.jsonl'}", *SHORT)
    done = run("checkup", folder / "tiny", *words)
    assert done.exit_code == 0, done.output
    for part in ("Side effects of", "perplexity", "next-token agreement", "chance", "condition", "a token", "* marks"):
        assert part in done.stdout
    assert "done examining the unedited model" in done.stderr


def test_a_checkpoint_is_compared_with_its_base(folder: Path, tmp_path: Path) -> None:
    done = run("attach", folder / "tiny", folder / "one", "--out", tmp_path / "edited")
    assert done.exit_code == 0, done.output
    words = (*SHORT, "--without", "latency")
    stored = said("checkup", tmp_path / "edited", *words)
    fresh = said("checkup", folder / "tiny", "--edit", folder / "one", *words)
    assert stored["results"][0]["changes"] == fresh["results"][0]["changes"]
    assert stored["results"][0]["matrices"] == fresh["results"][0]["matrices"]
    assert stored["base"] == fresh["base"]
    refused = run("checkup", tmp_path / "edited", *words, "--dtype", "bfloat16")
    assert refused.exit_code == 2
    assert "its weights keep their type" in " ".join(refused.output.split())


def test_an_edit_of_prompts(folder: Path) -> None:
    found = said("checkup", folder / "tiny", "--edit", folder / "told", *SHORT, "--without", "latency")
    (result,) = found["results"]
    assert result["changes"]["perplexity"]["difference"] == 0
    assert result["changes"]["drift"]["after"] > 0
    assert result["matrices"] == []
    assert any("changes prompts, which perplexity" in text for text in found["warnings"])


def test_tasks_of_the_harness(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    # Without the thousands of tasks that the harness brings, which take a dozen seconds to be listed.
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    rows = [{"q": f"The {word} is in", "a": ["Rome", "Paris"], "gold": 1} for word in ("tower", "river", "town")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "kecore_places", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "doc_to_text": "{{q}}", "doc_to_choice": "{{a}}", "doc_to_target": "gold", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "places.yaml").write_text(json.dumps(task))  # JSON is YAML
    words = ("--harness", "kecore_places", "--harness-folder", tmp_path, "--without", "latency,matrices,perplexity")
    found = said("checkup", folder / "tiny", "--edit", folder / "one", "--limit", 2, *words)
    assert found["conditions"]["harness"].items() >= {"tasks": ["kecore_places"], "limit": 2}.items()
    assert found["results"][0]["changes"]["kecore_places.acc"]["items"] == 2
    shown = run("checkup", folder / "tiny", "--edit", folder / "one", "--limit", 2, *words)
    assert "kecore_places.acc" in shown.stdout


def test_a_model_that_has_collapsed(folder: Path, tmp_path: Path) -> None:
    edit = load_edit(folder / "two")
    assert isinstance(edit, WeightEdit)
    name, update = next(iter(edit.updates.items()))
    broken = replace(edit, updates={name: Dense(torch.full(shape_of(update), 3e38))})  # overflows in the next product
    broken.save(tmp_path / "broken")
    found = said("checkup", folder / "tiny", "--edit", tmp_path / "broken", *SHORT, "--without", "latency,matrices")
    changes = found["results"][0]["changes"]
    assert "drift" not in changes
    assert changes["agreement"]["after"] == 0
    assert changes["perplexity"]["after"] is None
    assert any("the perplexity after the edit is not finite" in text for text in found["warnings"])
    assert any("on 4 of 4 prompts the drift is not finite" in text for text in found["warnings"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no edits: give --edit"),
        (("--edit", "nowhere"), "nowhere: no such file"),
        (("--edit", "{one}", "--edit", "{one}"), "given twice by --edit"),
        (("--edit", "{one}", "--without", "speed"), "no part 'speed' to leave out"),
        (("--edit", "{one}", "--task", "chess={cola}"), "no task 'chess'"),
        (("--edit", "{one}", "--task", "{cola}", "--task", "cola={cola}"), "is given twice"),
        (("--edit", "{one}", "--task", "mrpc={cola}"), "'sentence1' is missing"),
        (("--edit", "{one}", "--text", "nowhere.txt"), "no such text file"),
        (("--edit", "{one}", "--prompts", "nowhere.txt"), "cannot be read"),
        (("--edit", "{one}", "--limit", "0"), "--limit"),
        (("--edit", "{one}", "--memory", "much"), "--memory must be a size"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    places = {"one": folder / "one", "cola": folder / "cola.jsonl"}
    done = run("checkup", "no-such-model", *(word.format(**places) for word in words))
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.split())


def test_an_edit_of_another_model_is_refused_before_anything_is_asked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.save_model(tiny_model("llama", layers=2, seed=1), tiny_tokenizer(), tmp_path / "other")
    monkeypatch.setattr(Examination, "take", lambda *_, **__: pytest.fail("the model was asked"))
    done = run("checkup", tmp_path / "other", "--edit", folder / "one", *SHORT)
    assert done.exit_code == 2, done.output
    assert "was made for other weights than those of" in " ".join(done.stderr.split())
