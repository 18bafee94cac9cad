"""Scores of continuations: against the definition, against padding, against sharing."""

from __future__ import annotations

import math

import pytest
import torch
from slow_reference import log_probs
from tiny_worlds import World, make_world

from kecore.api.errors import PromptTooLongError, RequestError
from kecore.inference import score_continuations
from kecore.inference.batching import micro_batches
from kecore.text import Encoder, Rows

PAIRS = [
    ("The capital of France is", "Rome"),
    ("The capital of France is", "Paris"),
    ("The Danube", "flows to the Black Sea"),
    ("Where does the Danube flow? It flows to", "Berlin"),
    ("The mother tongue of Danielle Darrieux, that of Apollo and that of France is", "Greek"),
    ("The capital of France is", "Rome"),
]


def test_equals_the_definition(world: World) -> None:
    found = score_continuations(world.view, world.encoder, PAIRS)
    for (prompt, target), score in zip(PAIRS, found, strict=True):
        values, correct = log_probs(world.view.model, world.encoder.tokenizer, prompt, target)
        assert score.log_probs == pytest.approx(values, abs=1e-9)
        assert score.correct == tuple(correct)
        assert score.total == pytest.approx(sum(values))
        assert score.mean == pytest.approx(sum(values) / len(values))


def test_does_not_depend_on_the_batch(world: World) -> None:
    whole = score_continuations(world.view, world.encoder, PAIRS)
    alone = [score_continuations(world.view, world.encoder, [pair])[0] for pair in PAIRS]
    pieces = score_continuations(world.view, world.encoder, PAIRS, batch_tokens=1)
    for a, b, c in zip(whole, alone, pieces, strict=True):
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-9)
        assert a.log_probs == pytest.approx(c.log_probs, abs=1e-9)
        assert a.argmax == b.argmax == c.argmax


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_scores_in_float32(dtype: torch.dtype) -> None:
    world = make_world("llama", dtype)
    exact = score_continuations(make_world("llama").view, world.encoder, PAIRS)
    found = score_continuations(world.view, world.encoder, PAIRS)
    tolerance = 1e-4 if dtype is torch.float32 else 0.2
    for a, b in zip(found, exact, strict=True):
        assert a.log_probs == pytest.approx(b.log_probs, abs=tolerance)


def test_padding_side_does_not_matter(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    right = score_continuations(world.view, world.encoder, PAIRS)
    plain = Encoder.rows

    def left(self: Encoder, ids: list[list[int]], columns: list[int] | None = None) -> Rows:
        return plain(self, ids, [len(row) - 1 for row in ids])

    monkeypatch.setattr(Encoder, "rows", left)
    padded_left = score_continuations(world.view, world.encoder, PAIRS)
    for a, b in zip(right, padded_left, strict=True):
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-9)
        assert a.argmax == b.argmax


def test_equal_contexts_run_once(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = small.encoder
    one = [t for t in ("Rome", "Paris", "France", "Italy") if len(encoder.encode("is", t).ids) == 2]
    assert len(one) >= 2
    seen: list[int] = []
    run = type(small.view).logits_at

    def counted(self: object, rows: Rows, *at: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows.input_ids))
        return run(self, rows, *at)  # type: ignore[arg-type]

    monkeypatch.setattr(type(small.view), "logits_at", counted)
    score_continuations(small.view, encoder, [("is", target) for target in one] * 2)
    assert seen == [1]


def test_model_is_left_as_it_was(small: World) -> None:
    model = small.view.model
    model.train()
    before = torch.random.get_rng_state()
    score_continuations(small.view, small.encoder, PAIRS)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(before, torch.random.get_rng_state())
    model.eval()


def test_logits_that_are_not_finite_are_wrong_with_probability_0(small: World) -> None:
    head = small.view.model.transformer.ln_f.bias
    kept = head.detach().clone()
    with torch.no_grad():
        head.fill_(math.nan)
    try:
        (score,) = score_continuations(small.view, small.encoder, PAIRS[:1])
    finally:
        with torch.no_grad():
            head.copy_(kept)
    assert score.mean == -math.inf
    assert math.exp(score.mean) == 0
    assert not any(score.correct)


def test_nothing_to_score(small: World) -> None:
    assert score_continuations(small.view, small.encoder, []) == []


@pytest.mark.parametrize("pair", [("The capital", ""), ("", "Rome")])
def test_prompt_and_continuation_need_tokens(small: World, pair: tuple[str, str]) -> None:
    with pytest.raises(RequestError, match="both need tokens"):
        score_continuations(small.view, small.encoder, [pair])


def test_too_long(small: World) -> None:
    encoder = Encoder(small.encoder.tokenizer, max_length=4)
    with pytest.raises(PromptTooLongError):
        score_continuations(small.view, encoder, PAIRS)


def test_progress_ends_at_the_total(small: World) -> None:
    calls: list[tuple[str, int, int]] = []
    score_continuations(small.view, small.encoder, PAIRS, batch_tokens=64, progress=lambda *call: calls.append(call))
    assert calls[-1][1] == calls[-1][2]
    assert len(calls) > 1


def test_micro_batches_hold_every_row_once_and_keep_the_budget() -> None:
    lengths, costs = [5, 1, 9, 9, 2, 40], [1, 1, 2, 1, 1, 1]
    batches = list(micro_batches(lengths, costs, 24))
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    for batch in batches:
        padded = max(lengths[i] for i in batch) * len(batch) + sum(costs[i] for i in batch)
        assert padded <= 24 or len(batch) == 1
