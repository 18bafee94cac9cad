"""``kecore trace`` on a tiny model: the figures as JSON, the heat map as a PNG, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kecore.evaluate import load_records
from kecore.testing import tiny_model, tiny_tokenizer

Run = Callable[..., Any]
KNOWNS = [
    {"known_id": 0, "subject": "France", "attribute": "Paris", "prompt": "The capital of France is"},
    {"known_id": 1, "subject": "Tim Cook", "attribute": "Apple", "prompt": "Tim Cook leads", "relation_id": "P169"},
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_model("llama", layers=2).save_pretrained(folder)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_traces_facts(kecore: Run, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    facts, out = tmp_path / "knowns.json", tmp_path / "map.png"
    facts.write_text(json.dumps(KNOWNS))
    records = load_records(facts)
    assert (records.format, records[1].request.target, records[1].labels["relation"]) == ("knowns", "Apple", "P169")
    result = kecore(
        "trace", model, "--facts", facts, "--any-answer", "--samples", 2, "--out", out, "--json", "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert (values["traced"], values["asked"]) == (2, 2)
    assert values["suggested_layer"] in (0, 1)
    assert [len(table) for table in values["prompts"][0]["restored"].values()] == 3 * [
        len(values["prompts"][0]["tokens"])
    ]
    assert values["total_effect"] == pytest.approx(values["clean"] - values["corrupted"])
    assert out.read_bytes().startswith(b"\x89PNG")


def test_traces_one_prompt(kecore: Run, model: Path) -> None:
    result = kecore("trace", model, "--prompt", "The capital of {} is", "--subject", "France", "--kinds", "mlp",
                    "--samples", 1, "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "1 traced of 1" in result.stdout
    assert "last subject token" in result.stdout


def test_finds_knowledge_neurons(kecore: Run, model: Path) -> None:
    words = ["trace", model, "--prompt", "The capital of France is", "--subject", "France", "--kinds", "mlp",
             "--samples", 1, "--neurons", "--device", "cpu"]  # fmt: skip
    result = kecore(*words, "--json")
    assert result.exit_code == 0, result.output
    (prompt,) = json.loads(result.stdout)["prompts"]
    attributions = [neuron["attribution"] for neuron in prompt["neurons"]]
    assert len(attributions) >= 2
    assert attributions == sorted(attributions, reverse=True)
    shown = kecore(*words)
    assert f"Knowledge neurons: {len(attributions)} in all" in shown.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "The capital of France is"], "--prompt and --subject"),
        (["--prompt", "The capital of France is", "--subject", "Italy"], "not in the prompt"),
        (["--prompt", "France is", "--subject", "France", "--kinds", "heads"], "hidden,mlp,attention"),
        (["--prompt", "France is", "--subject", "France", "--out", "map.pdf"], ".png"),
    ],
)
def test_bad_input_is_refused(kecore: Run, words: list[str], message: str) -> None:
    result = kecore("trace", "no-such-model", *words)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
