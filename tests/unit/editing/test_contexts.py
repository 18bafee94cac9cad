from __future__ import annotations

from typing import Any

import pytest
import torch

from kecore.editing.contexts import joined, sample
from kecore.testing import Snapshot
from kecore.text import Encoder


def test_the_empty_context_leaves_a_prompt_as_it_is() -> None:
    assert joined("", "The capital") == "The capital"
    assert joined("I said", "The capital") == "I said. The capital"


def test_same_seed_same_contexts_whatever_the_global_random_state(world: Any) -> None:
    torch.manual_seed(1)
    first = sample(world.view, world.encoder, 7, 6, seed=5)
    torch.manual_seed(2)
    assert sample(world.view, world.encoder, 7, 6, seed=5) == first
    assert sample(world.view, world.encoder, 7, 6, seed=6) != first


def test_model_and_random_state_are_left_alone(world: Any) -> None:
    before = Snapshot(world.view.model)
    with world.view.frozen():
        sample(world.view, world.encoder, 3, 4, seed=0)
    assert before.differences() == []


def test_contexts_can_stand_before_a_prompt(world: Any) -> None:
    contexts = sample(world.view, world.encoder, 11, 8, seed=0)
    assert contexts[0] == ""
    assert len(contexts) == 12
    for text, opening in zip(contexts[1:], ["The", "Therefore", "Because", "I", "You"] * 3, strict=False):
        assert text.startswith(opening)
        assert not set(text) & set("{}\n")
        assert text == " ".join(text.split())


def test_tokens_come_from_the_five_most_probable(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.Tensor] = []
    original = torch.multinomial

    def spy(probabilities: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert probabilities.shape == (2, 5)
        assert probabilities.sum(1).tolist() == pytest.approx([1.0, 1.0])
        chosen.append(original(probabilities, *args, **kwargs))
        return chosen[-1]

    monkeypatch.setattr(torch, "multinomial", spy)
    sample(world.view, world.encoder, 2, 6, seed=0)
    assert len(chosen) == 6


def test_no_contexts_need_no_model(world: Any) -> None:
    assert sample(world.view, world.encoder, 0, 6, seed=0) == ("",)


def test_contexts_are_plain_text_in_a_chat_session_too(world: Any) -> None:
    chat = Encoder(world.encoder.tokenizer, chat=True)
    assert sample(world.view, chat, 3, 4, seed=0) == sample(world.view, world.encoder, 3, 4, seed=0)
