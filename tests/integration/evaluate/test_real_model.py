"""SmolLM2-135M: batched scores against one prompt at a time from the definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from slow_reference import counterfact, greedy

from kecore import data
from kecore.evaluate import Protocol, compare, evaluate, generate, load_records
from kecore.model_view import ModelView
from kecore.text import Encoder
from kecore.types import EditRecord

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def records() -> list[EditRecord]:
    """Eight CounterFact records with two neighbours each: enough to differ, few enough to ask one by one."""
    found = load_records(data.path("counterfact_sample.jsonl"), limit=8)
    return [replace(record, neighbourhood=record.neighbourhood[:2]) for record in found]


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
    assert {key: found[key].value for key in wanted} == pytest.approx(wanted, abs=1e-6)
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
