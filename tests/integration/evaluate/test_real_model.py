"""SmolLM2-135M: batched scores against one prompt at a time from the definition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from make_records import ask, make_record
from slow_reference import Slow, counterfact, greedy

from kecore import Editor, data
from kecore.api.types import EditRecord, EditRequest
from kecore.evaluate import Protocol, compare, evaluate, load_records
from kecore.inference import generate
from kecore.model import ModelView
from kecore.text import Encoder

pytestmark = pytest.mark.real_model

RICH = make_record(
    EditRequest("The capital of {} is", "Italy", "Vienna", "Rome", id="rich"),
    rephrases=("Italy has its capital in",),
    neighbourhood=("The capital of Lazio is",),
    target_aliases=("the city of Vienna",),
    truth_aliases=("the city of Rome",),
    portability={
        "reasoning": (ask("The mayor of the capital of Italy speaks", "German", "Austrian German"),),
        "conditional": (
            ask("Italy is governed from", "Vienna", conditions=(ask("The capital of France is", "Paris"),)),
            ask("Italy is near", "Austria", conditions=(ask("The capital of Spain is", "Lisbon"),)),
        ),
    },
    locality={"far": (ask("The Danube flows into", "the Black Sea"), ask("Berlin is known for"))},
    multi_hop=(
        {
            "questions": (
                "The river through the capital of Italy is the",
                "What river flows through Italy's capital? The",
            ),
            "answers": ("Danube",),
            "hops": (ask("The capital of Italy is", "Vienna"), ask("The river through Vienna is the", "Danube")),
        },
    ),
)


@pytest.fixture(scope="module")
def records() -> list[EditRecord]:
    """Eight CounterFact records with two neighbours each: enough to differ, few enough to ask one by one."""
    found = load_records(data.path("counterfact_sample.jsonl"), limit=8)
    return [record.with_probes("neighbourhood", record.probes_of("neighbourhood")[:2]) for record in found]


@pytest.fixture(scope="module")
def view(smollm2: tuple[Any, Any]) -> ModelView:
    return ModelView.of(smollm2[0])


def test_counterfact_equals_the_definition(
    smollm2: tuple[Any, Any], view: ModelView, records: list[EditRecord]
) -> None:
    model, tokenizer = smollm2
    assert next(model.parameters()).dtype == torch.float32
    found = evaluate(view, Encoder(tokenizer), records, Protocol(max_new_tokens=0)).scores
    wanted = counterfact(model, tokenizer, records)
    large = {key: wanted.pop(key) for key in ("perplexity", "paraphrase_perplexity")}
    assert {key: found[key].value for key in wanted} == pytest.approx(wanted, abs=1e-6)
    assert {key: found[key].value for key in large} == pytest.approx(large, rel=1e-4)
    assert found["neighbourhood_success"].probes == 16


def test_generation_equals_one_prompt_at_a_time(
    smollm2: tuple[Any, Any], view: ModelView, records: list[EditRecord]
) -> None:
    model, tokenizer = smollm2
    prompts = [record.request.text for record in records[:4]]
    found = generate(view, Encoder(tokenizer), prompts, max_new_tokens=8)
    assert [list(item.ids) for item in found] == [greedy(model, tokenizer, p, 8) for p in prompts]


def test_plausible(smollm2: tuple[Any, Any], view: ModelView, records: list[EditRecord]) -> None:
    protocol = Protocol(max_new_tokens=0)
    found = evaluate(view, Encoder(smollm2[1]), records, protocol)
    # Before an edit the old answers win, and nothing has moved.
    assert found.scores["edit_success"].value < 0.5 < found.scores["neighbourhood_success"].value
    assert compare(found, found).scores["neighbourhood_stability"].value == 1


def test_every_metric_of_an_edited_model_equals_the_definition(
    smollm2: tuple[Any, Any], records: list[EditRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = smollm2
    monkeypatch.setattr("kecore.evaluate.runner.PASSAGE_TOKENS", 16)
    one = records[0]
    for kind in ("paraphrase", "neighbourhood", "generation"):
        one = one.with_probes(kind, one.probes_of(kind)[:1])
    asked = [one, RICH]
    protocol = Protocol(max_new_tokens=3, extra=("kl", "fluency", "opinion"))
    editor, base = Editor(model, tokenizer), copy.deepcopy(model)
    before = editor.evaluate(asked, protocol)
    editor.edit(asked, "ft-m", steps=10)
    try:
        after = compare(before, editor.evaluate(asked, protocol))
        wanted = Slow(model, base, tokenizer, 3, length=16).records(asked)
    finally:
        editor.revert()
    found = {key: score.value for key, score in after.scores.items() if "." not in key}
    # Probabilities differ by the rounding of float32, what is counted does not differ.
    measured = {key for key in wanted if key.endswith(("magnitude", "perplexity", "kl", "opinion"))}
    assert {k: found[k] for k in measured} == pytest.approx({k: wanted[k] for k in measured}, rel=1e-4, abs=1e-6)
    counted = found.keys() - measured
    assert {k: found[k] for k in counted} == pytest.approx({k: wanted[k] for k in counted}, rel=1e-12)
    assert found.keys() == wanted.keys()
    assert after.scores["edit_success"].value > before.scores["edit_success"].value
    assert found["neighbourhood_kl"] > 0
    assert after.scores["portability.conditional"].probes == 1
