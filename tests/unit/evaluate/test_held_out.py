"""Held-out text against sums by hand, on a tiny model."""

from __future__ import annotations

import math

import pytest
import torch

from kecore import Editor
from kecore.api.errors import ConfigError, DataFormatError
from kecore.evaluate.held_out import Drift, HeldOutText, Reading, drift
from kecore.evaluate.protocol import Protocol
from kecore.testing import tiny_model, tiny_tokenizer

PASSAGES = ["The tower is in the city of Paris.", "Anna speaks it, and Tim Cook is in Berlin.", "x"]


def test_a_reading_is_the_model_s_own() -> None:
    editor = Editor(tiny_model("gpt2"), tiny_tokenizer())
    text = HeldOutText.of(editor.encoder, PASSAGES[:2], window=6)
    base = text.read(editor.view, editor.encoder)
    loss, tokens = 0.0, 0
    for row, guesses in zip(text.rows, base.next_tokens, strict=True):
        assert 2 <= len(row) <= 6
        logits = editor.model(input_ids=torch.tensor([row])).logits.detach()[0, :-1]
        loss -= float(logits.log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None]).sum())
        assert tuple(logits.argmax(-1).tolist()) == guesses
        tokens += len(row) - 1
    assert base.perplexity == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    assert drift(base, base) == Drift(base.perplexity, base.perplexity, 1.0, pytest.approx(0.34, abs=0.01), 1.0, tokens)
    with torch.no_grad():
        editor.model.transformer.h[1].mlp.c_proj.weight.mul_(3.0)
    changed = drift(base, text.read(editor.view, editor.encoder))
    assert changed.perplexity != base.perplexity
    assert Drift.from_json(changed.to_json()) == changed


def test_drift_by_hand() -> None:
    base = Reading((2.0, 4.0), ((1, 2), (3, 4, 5, 6)))
    now = Reading((3.0, math.inf), ((1, 0), (3, 4, 5, -1)))
    found = drift(base, now)
    assert found.agreement == pytest.approx((1 / 2 + 3 / 4) / 2)
    assert found.base_perplexity == pytest.approx(math.exp(1))
    assert math.isinf(found.perplexity)
    assert found.to_json()["perplexity"] is None
    assert Drift.from_json(found.to_json()) == found


def test_what_cannot_be_read_is_refused() -> None:
    encoder = Editor(tiny_model("gpt2"), tiny_tokenizer()).encoder
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        HeldOutText.of(encoder, PASSAGES, window=1)
    with pytest.raises(DataFormatError, match="no passage"):
        HeldOutText.of(encoder, [""])
    with pytest.raises(ConfigError, match="different texts"):
        drift(Reading((1.0,), ((1,),)), Reading((1.0,), ((1, 2),)))


def test_what_was_drawn_is_followed() -> None:
    protocol = Protocol(edits="sequential", sample=10)
    few, many = protocol.drawn(20), protocol.drawn(200)
    assert len(few) == len(many) == 10
    assert {position for position in many if position < 20} <= set(few)
    assert protocol.drawn(10) == list(range(10))
    assert Protocol(edits="sequential").hash() != protocol.hash()
    with pytest.raises(ConfigError, match="'sample' is of sequential editing only"):
        Protocol.make({"sample": 3})
