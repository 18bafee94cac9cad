"""CaliNet: slots that begin without an effect, facts that they are trained on, and edits behind one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory_setting import FACT, OTHER, logits, mean, opened, writes_with_a_cache_as_without

from kecore import Editor, ModuleEdit
from kecore.api.errors import ConfigError
from kecore.engine.texts import load_passages
from kecore_methods.memory.calinet import CaliNet
from kecore_methods.memory.neurons import Block, Neurons
from kecore_methods.memory.unrelated import read_token_queries

CONFIG: dict[str, Any] = {"steps": 25, "slots": 6, "contexts": 1, "context_tokens": 3}


@pytest.fixture
def editor() -> Editor:
    return opened()


def effect(edit: Any) -> Neurons:
    assert isinstance(edit, ModuleEdit)
    assert isinstance(edit.effect, Neurons)
    return edit.effect


def test_slots_are_trained_on_all_facts_together(editor: Editor) -> None:
    before = [mean(editor, request) for request in (FACT, OTHER)]
    edit = editor.edit([FACT, OTHER], CaliNet, layers=(1, 2), **CONFIG)
    made = effect(edit)
    assert made.activation == "gelu"
    assert made.keys.shape == (2, 6, 32)
    plain = opened()
    with plain.view.frozen():
        for i, layer in enumerate((1, 2)):  # the paper's slots have no biases: these take the mean off, and no more
            ids = [plain.encoder.encode(" ".join(words[:24])).ids[:24] for words in load_passages()]
            at_mean = read_token_queries(plain.view, plain.encoder, ids, Block.of(plain.view, layer)).mean(0)
            assert torch.allclose(at_mean @ made.keys[i].t(), -made.biases[i], atol=1e-5)
    assert [pair[1] for pair in made.blocks] == [f"model.layers.{i}.mlp.down_proj" for i in (1, 2)]
    assert all(mean(editor, request) > old + 1 for request, old in zip((FACT, OTHER), before, strict=True))


def test_slots_begin_without_an_effect(editor: Editor) -> None:
    """Their values are zero: a step too small to see leaves the loss of the first pass, the unedited model's."""
    texts = (FACT.text, f"x. {FACT.text}")
    plain = [logits(editor, text) for text in texts]
    before = -mean(editor, FACT)
    config: dict[str, Any] = {**CONFIG, "contexts": 0, "steps": 1, "learning_rate": 1e-12}
    edit = editor.edit(FACT, CaliNet, **config)
    assert edit.notes["loss"][0] == pytest.approx(before, abs=1e-4)
    for text, old in zip(texts, plain, strict=True):
        assert torch.allclose(logits(editor, text), old, atol=1e-5)


def test_slots_go_by_the_number_of_facts() -> None:
    assert [CaliNet.Config().slot_count(facts) for facts in (1, 7)] == [4, 28]
    assert [CaliNet.Config(slots_per_fact=0.64).slot_count(facts) for facts in (1, 100)] == [1, 64]
    assert CaliNet.Config(slots=9).slot_count(100) == 9


def test_further_edit_puts_its_slots_behind(editor: Editor) -> None:
    before, other = mean(editor, FACT), mean(editor, OTHER)
    first = effect(editor.edit(FACT, CaliNet, **CONFIG))
    middle, gain = logits(editor, FACT.text), mean(editor, FACT) - before
    second = effect(editor.edit(OTHER, CaliNet, **CONFIG))
    assert second.keys.shape[1] == 2 * first.keys.shape[1]
    for name in ("keys", "values"):
        assert torch.equal(getattr(second, name)[:, :6], getattr(first, name))
    assert mean(editor, OTHER) > other + 1
    assert mean(editor, FACT) - before > 0.5 * gain
    editor.revert()
    assert torch.equal(logits(editor, FACT.text), middle)


def test_writing_with_a_cache_is_writing_without_one(editor: Editor) -> None:
    editor.edit([FACT, OTHER], CaliNet, **CONFIG)
    writes_with_a_cache_as_without(editor, [FACT.text, OTHER.text, "The iPhone"])


def test_other_layers_of_a_session_are_refused(editor: Editor) -> None:
    editor.edit(FACT, CaliNet, layers=(1,), **CONFIG)
    with pytest.raises(ConfigError, match=r"in the layers \[1\], not \[2\]"):
        editor.edit(OTHER, CaliNet, layers=(2,), **CONFIG)
