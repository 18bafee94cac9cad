"""Rows that join a batch while it is written, against each of them alone without a cache."""

from __future__ import annotations

import pytest
import torch
from slow_reference import greedy
from tiny_worlds import make_world
from torch import nn
from transformers import DynamicCache

from kecore.inference.decoding import Decoding
from kecore.model import ModelView
from kecore.testing import tiny_model, tiny_tokenizer
from kecore.text import Encoder

PROMPTS = [
    "The capital of France is",
    "The Danube",
    "Where does the Danube flow? It flows to the",
    "The mother tongue of Danielle Darrieux is French, that of Apollo is",
]
LENGTH = 9


def _begin(view: ModelView, encoder: Encoder, prompts: list[str]) -> Decoding:
    rows = [list(encoder.encode(prompt).ids) for prompt in prompts]
    return Decoding(view, encoder.rows(rows, [len(row) - 1 for row in rows]))


def _write(decoding: Decoding, texts: list[list[int]], tokens: int) -> None:
    for _ in range(tokens):
        chosen = decoding.logits().argmax(-1)
        for text, token in zip(texts, chosen.tolist(), strict=True):
            text.append(token)
        decoding.append(chosen)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_rows_join_while_others_are_written(architecture: str) -> None:
    world = make_world(architecture)
    view, encoder = world.view, world.encoder
    assert view.joins_rows
    texts: list[list[int]] = [[] for _ in PROMPTS]
    with view.frozen():
        first, second = _begin(view, encoder, PROMPTS[3:]), _begin(view, encoder, PROMPTS[:2])
        _write(first, texts[3:], 3)
        _write(second, texts[:2], 1)
        assert second.join(first)  # the wider rows join the narrower ones
        members = [0, 1, 3]
        _write(second, [texts[index] for index in members], 2)
        third = _begin(view, encoder, PROMPTS[2:3])
        _write(third, texts[2:3], 1)
        assert second.keep([0, 1])
        width = second.width
        assert second.join(third)  # the long row is gone, and so are the columns that it alone needed
        assert second.width < width
        _write(second, [texts[index] for index in (0, 1, 2)], 4)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert text == greedy(view.model, encoder.tokenizer, prompt, len(text))


@pytest.mark.parametrize("architecture", ["mistral", "openai-gpt"])  # a window of attention; no cache
def test_rows_stay_apart_where_a_cache_cannot_be_joined(architecture: str) -> None:
    view, encoder = ModelView.of(tiny_model(architecture)), Encoder(tiny_tokenizer())
    with view.frozen():
        batches = [_begin(view, encoder, [prompt]) for prompt in PROMPTS[:2]]
        texts: list[list[int]] = [[], []]
        for _ in range(LENGTH):
            for batch, text in zip(batches, texts, strict=True):
                _write(batch, [text], 1)
            assert not batches[0].join(batches[1])
    for prompt, text in zip(PROMPTS, texts, strict=False):
        assert text == greedy(view.model, encoder.tokenizer, prompt, LENGTH)


def test_rows_do_not_join_where_hooks_act_or_where_it_was_seen_to_change_them(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world("llama")
    view, encoder = world.view, world.encoder
    with view.frozen():
        batches = [_begin(view, encoder, [prompt]) for prompt in PROMPTS[:2]]
        for batch in batches:
            _write(batch, [[]], 1)
        handle = view.layers[0].module.register_forward_hook(lambda *_: None)
        assert not batches[0].join(batches[1])
        handle.remove()

    def mixed(cache: DynamicCache, second: DynamicCache) -> bool:
        for layer in cache.layers:
            layer.keys = layer.values = torch.cat([layer.keys, layer.keys])
        return True

    monkeypatch.setattr("kecore.model.verify.join_caches", mixed)
    assert not ModelView.of(view.model).joins_rows


def test_a_module_that_is_no_cache_is_not_joined() -> None:
    from kecore.model.caches import join_caches

    assert not join_caches(nn.Identity(), nn.Identity())
