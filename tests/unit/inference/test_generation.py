"""Greedy generation: against one prompt at a time without a cache."""

from __future__ import annotations

import random

import pytest
import torch
from slow_reference import greedy
from tiny_worlds import World, make_world
from torch import Tensor
from transformers import DynamicCache

from kecore.api.errors import ConfigError
from kecore.inference import generate
from kecore.inference.decoding import Decoding
from kecore.inference.generation import _Sampler
from kecore.model import ModelView
from kecore.model.view import Pass
from kecore.testing import tiny_model, tiny_tokenizer
from kecore.text import Encoder, Rows

PROMPTS = [
    "The capital of France is",
    "The Danube",
    "Where does the Danube flow? It flows to the",
    "The mother tongue of Danielle Darrieux is French, that of Apollo is",
]


def test_equals_decoding_one_at_a_time_without_cache(world: World) -> None:
    found = generate(world.view, world.encoder, PROMPTS, max_new_tokens=12)
    for prompt, item in zip(PROMPTS, found, strict=True):
        assert list(item.ids) == greedy(world.view.model, world.encoder.tokenizer, prompt, 12)
        assert item.finished == (item.ids[-1] == world.encoder.tokenizer.eos_token_id)


def test_does_not_depend_on_the_batch_in_float32() -> None:
    world = make_world("llama", torch.float32)
    whole = generate(world.view, world.encoder, PROMPTS, max_new_tokens=12)
    alone = [generate(world.view, world.encoder, [p], max_new_tokens=12)[0] for p in PROMPTS]
    pieces = generate(world.view, world.encoder, PROMPTS, max_new_tokens=12, batch_tokens=1)
    assert whole == alone == pieces


def test_equal_prompts_keep_their_places(small: World) -> None:
    a, b, c = generate(small.view, small.encoder, [PROMPTS[0], PROMPTS[1], PROMPTS[0]], max_new_tokens=3)
    assert a == c
    assert len(b.ids) <= 3


def test_a_model_without_cache_reads_the_text_again(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = generate(small.view, small.encoder, PROMPTS, max_new_tokens=6)
    run = ModelView.run

    def without(self: ModelView, *args: object, **kwargs: object) -> Pass:
        out = run(self, *args, **kwargs)  # type: ignore[arg-type]
        out.cache = None
        return out

    monkeypatch.setattr(ModelView, "run", without)
    assert generate(small.view, small.encoder, PROMPTS, max_new_tokens=6) == cached


def _scripted(world: World, monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> None:
    """Let the model write given texts, one a row of the batch (longest prompt first)."""
    tokenizer = world.encoder.tokenizer
    script = [[*tokenizer(t, add_special_tokens=False)["input_ids"], 0] for t in texts]
    prompts: list[list[int]] = []

    def run(self: ModelView, rows: Rows, **_: object) -> Pass:
        read = [ids[mask.bool()].tolist() for ids, mask in zip(rows.input_ids, rows.attention_mask, strict=True)]
        prompts.extend(read if not prompts else [])
        logits = torch.zeros(len(read), len(tokenizer))
        for row, ids in zip(logits, read, strict=True):
            (says,) = {
                text[len(ids) - len(prompt)]
                for prompt, text in zip(prompts, script, strict=True)
                if len(ids) >= len(prompt) and ids == [*prompt, *text[: len(ids) - len(prompt)]]
            }
            row[says] = 1
        return Pass(scores=logits)

    monkeypatch.setattr(ModelView, "run", run)


def test_ends_at_newline_only_when_asked(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _scripted(small, monkeypatch, ["\n Rome\nand more of it"])
    (found,) = generate(small.view, small.encoder, ["The"], max_new_tokens=40, stop_at_newline=True)
    assert found.text == "Rome"
    assert found.finished
    _scripted(small, monkeypatch, [" Rome\nand<|end|>not this"])
    (found,) = generate(small.view, small.encoder, ["The"], max_new_tokens=40)
    assert found.text == "Rome\nand"
    assert found.finished


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (" Rome and. Paris\nand more of it", "Rome and"),  # what comes first ends it
        (" Rome\nand. more of it", "Rome"),
        (" Rome of it<|end|>not this", "Rome of it"),
        (". Paris", ""),
    ],
)
def test_ends_at_the_first_of_several_texts(
    small: World, monkeypatch: pytest.MonkeyPatch, written: str, text: str
) -> None:
    _scripted(small, monkeypatch, [written])
    (found,) = generate(small.view, small.encoder, ["The"], max_new_tokens=40, stop_at_newline=True, stop=[". ", "."])
    assert found.text == text
    assert found.finished


def test_rows_end_at_different_times(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _scripted(small, monkeypatch, [" Rome", " Paris is the capital of France", " Italy<|end|>"])
    prompts = ["The Danube flows to the", "The Danube", "The"]
    found = generate(small.view, small.encoder, prompts, max_new_tokens=40)
    assert [item.text for item in found] == ["Rome", "Paris is the capital of France", "Italy"]
    assert all(item.finished for item in found)


LIMITS = [2, 9, 12, 4]


def _rows_of_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each pass has from now on."""
    seen: list[int] = []
    logits = Decoding.logits

    def counted(self: Decoding) -> Tensor:
        found = logits(self)
        seen.append(len(found))
        return found

    monkeypatch.setattr(Decoding, "logits", counted)
    return seen


@pytest.mark.parametrize("drawn", [1, 3])
def test_rows_whose_text_has_ended_are_not_run_again(world: World, drawn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [
        generate(world.view, world.encoder, [prompt], max_new_tokens=limit, top_k=drawn)[0]
        for prompt, limit in zip(PROMPTS, LIMITS, strict=True)
    ]
    seen = _rows_of_passes(monkeypatch)
    assert generate(world.view, world.encoder, PROMPTS, max_new_tokens=LIMITS, top_k=drawn) == alone
    lengths = [len(item.ids) for item in alone]
    running = [sum(length > k for length in lengths) for k in range(max(lengths))]
    assert seen == running == sorted(running, reverse=True)
    assert seen[-1] < seen[0] == len(PROMPTS)


def test_rows_stay_where_a_hook_may_remember_them(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = generate(small.view, small.encoder, PROMPTS, max_new_tokens=LIMITS)
    seen = _rows_of_passes(monkeypatch)
    handle = small.view.layers[0].module.register_forward_hook(lambda *_: None)
    try:
        assert generate(small.view, small.encoder, PROMPTS, max_new_tokens=LIMITS) == wanted
    finally:
        handle.remove()
    assert set(seen) == {len(PROMPTS)}


@pytest.mark.parametrize("hooked", [False, True])  # with a hook the full row stays in the batch
@pytest.mark.parametrize("architecture", ["gpt2", "openai-gpt", "llama"])  # the second has no cache
def test_a_text_ends_where_the_context_is_full(architecture: str, hooked: bool) -> None:
    view, tokenizer = ModelView.of(tiny_model(architecture)), tiny_tokenizer()
    encoder = Encoder(tokenizer, max_length=view.max_length)
    long, short = " ".join(["Rome"] * 253), "The Danube"
    assert view.max_length == len(encoder.encode(long).ids) + 2
    handle = view.layers[0].module.register_forward_hook(lambda *_: None) if hooked else None
    one, other = generate(view, encoder, [long, short], max_new_tokens=12)
    if handle is not None:
        handle.remove()
    assert (len(one.ids), one.finished) == (3, False)
    assert list(one.ids) == greedy(view.model, tokenizer, long, 3)
    assert list(other.ids) == greedy(view.model, tokenizer, short, 12)


def test_rows_stay_in_a_cache_that_mixes_them_up(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = generate(small.view, small.encoder, PROMPTS, max_new_tokens=LIMITS)
    # The first rows stay, whichever were asked for.
    monkeypatch.setattr(
        DynamicCache, "reorder_cache", lambda self, index: self.batch_select_indices(torch.arange(len(index)))
    )
    view = ModelView.of(small.view.model)
    seen = _rows_of_passes(monkeypatch)
    assert not view.drops_rows
    assert generate(view, small.encoder, PROMPTS, max_new_tokens=LIMITS) == wanted
    assert set(seen) == {len(PROMPTS)}


def test_the_models_own_closing_tokens_end_a_text(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = small.encoder.tokenizer
    rome = tokenizer(" Rome", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(small.view.model.generation_config, "eos_token_id", [0, rome[-1]])
    _scripted(small, monkeypatch, [" is Rome and Paris"])
    (found,) = generate(small.view, small.encoder, ["The"], max_new_tokens=40)
    assert found.ids[-1] == rome[-1]
    assert found.finished


def test_length(small: World) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        generate(small.view, small.encoder, PROMPTS, max_new_tokens=0)
    with pytest.raises(ConfigError, match="at least 1"):
        generate(small.view, small.encoder, PROMPTS, max_new_tokens=[3, 3, 0, 3])
    with pytest.raises(ConfigError, match="top_k"):
        generate(small.view, small.encoder, PROMPTS, top_k=0)


def test_each_prompt_has_its_length(small: World) -> None:
    limits = [5, 2, 7, 1]
    whole = generate(small.view, small.encoder, PROMPTS, max_new_tokens=7)
    found = generate(small.view, small.encoder, PROMPTS, max_new_tokens=limits)
    assert [item.ids for item in found] == [item.ids[:n] for item, n in zip(whole, limits, strict=True)]


def test_draws_are_of_the_most_probable_and_in_proportion() -> None:
    choose = _Sampler(3, [random.Random(f"0 prompt {n}") for n in range(400)])
    logits = torch.log(torch.tensor([0.1, 0.5, 0.15, 0.25])).expand(400, 4)
    counts = torch.bincount(choose(logits, range(400)), minlength=4) / 400
    wanted = torch.tensor([0, 0.5, 0.15, 0.25]) / 0.9
    assert counts[0] == 0
    assert float((counts - wanted).abs().max()) < 0.08  # three standard deviations
