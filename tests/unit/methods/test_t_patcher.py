"""T-Patcher: its losses by hand, one patch a mistaken token, silence elsewhere, and one edit after another."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from memory_setting import FACT, FAR, OTHER, logits, mean, opened, writes_with_a_cache_as_without

from kecore import Editor, EditRequest, ModuleEdit
from kecore.api.errors import ConfigError
from kecore.inference import score_continuations
from kecore_methods.memory.neurons import Block, Neurons, read_queries
from kecore_methods.memory.t_patcher import TPatcher, locality_loss

CONFIG: dict[str, Any] = {"steps": 40, "passages": 8, "others": 4}


@pytest.fixture
def editor() -> Editor:
    return opened()


def effect(edit: Any) -> Neurons:
    assert isinstance(edit, ModuleEdit)
    assert isinstance(edit.effect, Neurons)
    return edit.effect


@pytest.mark.parametrize("hardest", [1, 3, 99])
def test_memory_loss_is_its_equation(hardest: int) -> None:
    """``l_m1 + l_m2`` with the sums over patches and queries written out."""
    generator = torch.Generator().manual_seed(0)
    unrelated = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    own = torch.randn(2, generator=generator, dtype=torch.float64)

    def top(values: list[float]) -> float:
        kept = sorted(values, reverse=True)[:hardest]
        return sum(math.exp(value) for value in kept) / len(kept)

    wanted = 0.0
    for patch in range(2):
        read = unrelated[:, patch].tolist()
        wanted += (top([r + 3 for r in read]) + top([r - float(own[patch]) + 2 for r in read])) / 2
    assert float(locality_loss(unrelated, own, -3.0, -2.0, hardest)) == pytest.approx(wanted, rel=1e-12)


def test_each_mistaken_token_gets_a_patch_and_no_other(editor: Editor) -> None:
    """Once the first word of a target is corrected, a longer one needs patches for what is behind it alone."""
    editor.edit(FACT, TPatcher, **CONFIG)
    assert editor.check(FACT).known == (FACT,)
    again = editor.edit(FACT, TPatcher, **CONFIG)
    assert again.notes["added"] == [0]
    assert again.notes["loss"] == [None]
    item = editor.encoder.encode(FACT.text, "Vienna Berlin")
    ids, best = item.ids, logits(editor, f"{FACT.text} Vienna Berlin")[0].argmax(-1)
    wrong = [i for i in range(item.start, len(ids)) if best[i - 1] != ids[i]]
    assert 0 < len(wrong) < len(ids) - item.start
    longer = editor.edit(EditRequest(FACT.prompt, FACT.subject, "Vienna Berlin"), TPatcher, **CONFIG)
    assert longer.notes["added"] == [len(wrong)]
    assert effect(longer).keys.shape == (1, longer.notes["patches"], 32)
    best = logits(editor, f"{FACT.text} Vienna Berlin")[0].argmax(-1)
    assert [int(best[i - 1]) for i in range(item.start, len(ids))] == list(ids[item.start :])


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
def test_texts_at_which_no_patch_is_active_are_bitwise_as_they_were(architecture: str) -> None:
    editor = opened(architecture)
    before = [logits(editor, text) for text in FAR]
    own = logits(editor, FACT.text)
    with editor.view.frozen():
        block = Block.of(editor.view, 3)
        read = [
            read_queries(editor.view, editor.encoder.rows([editor.encoder.encode(text).ids]), block) for text in FAR
        ]
    patch = effect(editor.edit(FACT, TPatcher, **CONFIG))
    silent = [bool((query @ patch.keys[0].t() + patch.biases[0] <= 0).all()) for query in read]
    assert any(silent)
    for text, quiet, old in zip(FAR, silent, before, strict=True):
        assert torch.equal(logits(editor, text), old) == quiet
    assert not torch.equal(logits(editor, FACT.text)[:, -1], own[:, -1])


def test_further_edit_leaves_the_patches_before_it_alone(editor: Editor) -> None:
    before = [mean(editor, request) for request in (FACT, OTHER)]
    first = effect(editor.edit(FACT, TPatcher, **CONFIG))
    middle = logits(editor, FACT.text)
    second = effect(editor.edit([OTHER], TPatcher, **CONFIG))
    count = first.keys.shape[1]
    assert second.keys.shape[1] > count
    for name in ("keys", "biases", "values"):
        assert torch.equal(getattr(second, name)[:, :count], getattr(first, name))
    gains = [mean(editor, request) - old for request, old in zip((FACT, OTHER), before, strict=True)]
    assert all(gain > 1 for gain in gains)
    editor.revert()
    assert torch.equal(logits(editor, FACT.text), middle)


def test_prompt_that_is_edited_again_says_the_later_target(editor: Editor) -> None:
    editor.edit(FACT, TPatcher, **CONFIG)
    editor.edit(EditRequest(FACT.prompt, FACT.subject, "Berlin"), TPatcher, **CONFIG)
    assert mean(editor, FACT, "Berlin") > mean(editor, FACT) + 1


def test_writing_with_a_cache_is_writing_without_one(editor: Editor) -> None:
    editor.edit([FACT, OTHER], TPatcher, **CONFIG)
    writes_with_a_cache_as_without(editor, [FACT.text, OTHER.text, FAR[0]])


def test_other_layer_of_a_session_is_refused(editor: Editor) -> None:
    editor.edit(FACT, TPatcher, layer=1, **CONFIG)
    with pytest.raises(ConfigError, match="at layer 1, not 2"):
        editor.edit(OTHER, TPatcher, layer=2, **CONFIG)


@pytest.mark.real_model
def test_real_fact_is_said_and_unrelated_text_is_bitwise_as_it_was(smollm2: tuple[Any, Any]) -> None:
    editor = Editor(*smollm2)
    fact = EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English")
    texts = ("Photosynthesis takes place in the", "Water boils at a temperature of")
    before = [logits(editor, text) for text in texts]
    with editor:
        edit = editor.edit(fact, TPatcher)
        assert edit.notes["added"] == [1]
        assert all(torch.equal(logits(editor, text), old) for text, old in zip(texts, before, strict=True))
        assert score_continuations(editor.view, editor.encoder, [(fact.text, "English")])[0].exact
