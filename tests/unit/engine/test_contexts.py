from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kecore import Editor, EditRequest
from kecore.api.identity import Fingerprint
from kecore.api.method import MethodContext
from kecore.edit import attached
from kecore.engine import contexts
from kecore.engine.contexts import of_session, sample
from kecore.model import ModelView
from kecore.testing import Snapshot
from kecore.text import Encoder, join_context


def test_the_empty_context_leaves_a_prompt_as_it_is() -> None:
    assert join_context("", "The capital") == "The capital"
    assert join_context("I said", "The capital") == "I said. The capital"


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


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where contexts are kept, even those of small models."""
    monkeypatch.setattr(contexts, "_WORTH_KEEPING", 1)
    monkeypatch.setenv("KECORE_CACHE", str(tmp_path))
    return tmp_path / "contexts"


def context_of(world: Any, **fields: Any) -> MethodContext:
    view: ModelView = world.view
    return MethodContext(config=None, encoder=world.encoder, base=Fingerprint.of(view.identity(), view.dtype), **fields)


def test_contexts_of_an_unedited_model_are_kept_by_content(
    world: Any, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = of_session(world.view, context_of(world), 3, 4)
    assert first == sample(world.view, world.encoder, 3, 4, seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(contexts, "sample", None)  # what is kept is not written again
        assert of_session(world.view, context_of(world), 3, 4) == first
    of_session(world.view, context_of(world, seed=1), 3, 4)
    of_session(world.view, context_of(world), 3, 5)
    assert len(list(kept.glob("*.safetensors"))) == 3
    with torch.no_grad():
        world.view.layers[0].site.linear.parameter.mul_(1.01)
    assert of_session(world.view, context_of(world), 3, 4) == sample(world.view, world.encoder, 3, 4, seed=0)
    assert len(list(kept.glob("*.safetensors"))) == 4


def test_contexts_of_an_unknown_model_are_not_kept(world: Any, kept: Path) -> None:
    of_session(world.view, replace(context_of(world), base=None), 3, 4)
    assert not kept.exists()


@pytest.mark.parametrize("kind", ["weights", "modules"])
def test_contexts_are_the_unedited_models_whatever_is_on_it(world: Any, kind: str, kept: Path) -> None:
    context, wanted = context_of(world), sample(world.view, world.encoder, 3, 6, seed=0)
    editor = Editor(world.view.model, world.encoder.tokenizer)
    facts = [EditRequest(opening + " {}", "Rome", "Italy") for opening in ("The", "I")]
    if kind == "weights":
        editor.edit(facts, "ft-m", learning_rate=1.0, steps=5)
    else:
        editor.edit(facts, "grace", steps=5)
    assert len(attached(world.view.model)) == 1
    assert kind == "modules" or sample(world.view, world.encoder, 3, 6, seed=0) != wanted
    assert of_session(world.view, context, 3, 6) == wanted
    assert len(attached(world.view.model)) == 1
    editor.revert()
    assert of_session(world.view, context_of(world), 3, 6) == wanted  # what was kept on disk
