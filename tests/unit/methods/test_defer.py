"""DEFER's gate and side network against loops in float64, how they are tuned, and its answers in batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from memory_setting import FACT, OTHER, Toy, logits, opened
from torch import Tensor, nn

from kecore import Editor, EditRequest, MethodContext, ModuleEdit
from kecore.api.errors import ConfigError
from kecore.batch import RequestBatch
from kecore.inference import score_continuations
from kecore.inference.generation import generate
from kecore_methods.memory.defer import Defer, DeferConfig, SideNetwork

TEXTS = ("The capital of France is", "The iPhone", "Where does the Danube")
CONFIG: dict[str, Any] = {"steps": 25}


@pytest.fixture
def editor() -> Editor:
    return opened()


@torch.no_grad()
def test_each_token_is_deferred_by_its_own_gate() -> None:
    """Outputs against a loop over rows and tokens, hard as in use and mixed as in tuning."""
    generator = torch.Generator().manual_seed(0)
    model, side = Toy(), SideNetwork("lm", 3, 4, 0.6)
    for buffer in side.buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    x = torch.randn(3, 6, 3, generator=generator)
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, :2] = 0
    plain = model(inputs_embeds=x, attention_mask=mask)
    hard, soft = plain.double().clone(), plain.double().clone()
    opened = 0
    for r in range(3):
        for t in range(6):
            key = x[r, t].double()
            logit = float(side.gate.double() @ (key / key.square().mean().sqrt()) + side.bias)
            gate = 1 / (1 + math.exp(-logit)) if mask[r, t] else 0.0
            value = plain[r, t].double() + side.side.double() @ key + side.shift.double()
            soft[r, t] = gate * value + (1 - gate) * plain[r, t].double()
            if gate >= 0.6:
                hard[r, t] = value
                opened += 1
    assert 0 < opened < 16
    with side.on(model):
        found = model(inputs_embeds=x, attention_mask=mask)
        torch.testing.assert_close(found.double(), hard, rtol=1e-5, atol=1e-5)
        assert torch.equal(found[hard == plain.double()], plain[hard == plain.double()])
        with side.mixing():
            torch.testing.assert_close(model(x, mask).double(), soft, rtol=1e-5, atol=1e-5)


def test_first_step_goes_down_the_gradient_of_the_mixture(editor: Editor) -> None:
    """One step of Adam moves every number by its unit against the sign of its gradient, taken here by hand."""
    view, layer = editor.view, 2
    config = DeferConfig(layer=layer, steps=1)
    projection = view.layers[layer].site.linear
    item = editor.encoder.encode(FACT.text, FACT.target)
    gate = torch.zeros(projection.d_in, requires_grad=True)
    side = torch.zeros(projection.d_out, projection.d_in, requires_grad=True)
    logits_of_gate: list[Tensor] = []

    def mixed(_module: nn.Module, args: Any, out: Tensor) -> Tensor:
        key = args[0]
        logit = (key / key.square().mean(-1, keepdim=True).sqrt()) @ gate - 2.0
        logits_of_gate.append(logit[0])
        opened = torch.sigmoid(logit)[..., None]
        return opened * (out + key @ side.t()) + (1 - opened) * out

    handle = projection.module.register_forward_hook(mixed)
    every = editor.model(input_ids=torch.tensor([item.ids])).logits[0].log_softmax(-1)
    handle.remove()
    loss = -torch.stack([every[j - 1, item.ids[j]] for j in range(item.start, len(item.ids))]).mean()
    opened = torch.sigmoid(logits_of_gate[0])
    loss = loss - opened[item.start - 1 : len(item.ids) - 1].log().mean()
    loss = loss - (1 - opened[: item.start - 1]).log().mean()
    gradients = torch.autograd.grad(loss, [gate, side])
    edit = Defer().plan(view, RequestBatch.of([FACT], editor.encoder), MethodContext(config, editor.encoder))
    assert edit.notes["loss"][0] == pytest.approx(float(loss.detach()), abs=1e-4)
    tensors = edit.effect.tensors()
    units = (0.3 / projection.d_in, 0.1 * float(projection.weight.square().mean().sqrt()))
    for name, unit, gradient in zip(("gate", "side"), units, gradients, strict=True):
        large = gradient.abs() > 1e-2 * gradient.abs().max()
        torch.testing.assert_close(tensors[name][large], (-unit * gradient.sign())[large], rtol=1e-2, atol=1e-6)


def test_an_edit_is_written_and_taken_off(editor: Editor) -> None:
    before = [logits(editor, text) for text in (FACT.text, *TEXTS)]
    first = score_continuations(editor.view, editor.encoder, [(FACT.text, FACT.target)])[0].mean
    edit = editor.edit(FACT, Defer, **CONFIG)
    assert isinstance(edit, ModuleEdit)
    assert edit.notes["deferred"] == [1.0]
    assert score_continuations(editor.view, editor.encoder, [(FACT.text, FACT.target)])[0].mean > first + 1
    editor.revert()
    after = [logits(editor, text) for text in (FACT.text, *TEXTS)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_closed_gate_leaves_every_bit(editor: Editor) -> None:
    before = [logits(editor, text) for text in TEXTS]
    editor.edit(FACT, Defer, closed=1000.0, **CONFIG)
    assert all(torch.equal(logits(editor, text), old) for text, old in zip(TEXTS, before, strict=True))


def test_batches_score_as_single_prompts_do(editor: Editor) -> None:
    editor.edit([FACT, OTHER], Defer, **CONFIG)
    pairs = [(text, "Vienna, not Rome") for text in (FACT.text, *TEXTS, f"Where? {OTHER.text}", OTHER.text)]
    together = score_continuations(editor.view, editor.encoder, pairs)
    alone = [score_continuations(editor.view, editor.encoder, [pair])[0] for pair in pairs]
    for a, b in zip(together, alone, strict=True):
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-4)


def test_writing_with_a_cache_is_writing_without_one(editor: Editor) -> None:
    editor.edit([FACT, OTHER], Defer, **CONFIG)
    texts = [FACT.text, OTHER.text, TEXTS[1]]
    found = generate(editor.view, editor.encoder, texts, max_new_tokens=6)
    for text, generation in zip(texts, found, strict=True):
        ids = list(editor.encoder.encode(text).ids)
        for token in generation.ids:
            with torch.no_grad():
                out = editor.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            assert float(out.max() - out[token]) < 1e-4
            ids.append(token)


def test_a_further_edit_goes_on_from_the_last(editor: Editor) -> None:
    first = editor.edit(FACT, Defer, **CONFIG)
    editor.edit(OTHER, Defer, **CONFIG)
    both = opened()
    one = both.edit([FACT, OTHER], Defer, **CONFIG)
    for text in (FACT.text, OTHER.text, *TEXTS):
        torch.testing.assert_close(logits(both, text), logits(editor, text), rtol=1e-4, atol=1e-4)
    assert len(one.notes["loss"]) == 2
    assert first.notes["loss"] == one.notes["loss"][:1]
    with pytest.raises(ConfigError, match="at layer 3, not 1"):
        editor.edit(EditRequest("{} lies by", "Rome", "Europe"), Defer, layer=1, **CONFIG)


def test_the_absolute_rate_is_one_step_of_every_number(editor: Editor) -> None:
    edit = editor.edit(FACT, Defer, steps=1, learning_rate=7e-5)
    side = edit.effect.tensors()["side"]  # type: ignore[attr-defined]
    assert float(side.abs().max()) == pytest.approx(7e-5, rel=1e-2)


@pytest.mark.real_model
def test_real_fact_is_written(smollm2: tuple[Any, Any]) -> None:
    editor = Editor(*smollm2)
    fact = EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English")
    before = logits(editor, fact.text)
    with editor:
        edit = editor.edit(fact, Defer)
        assert edit.notes["deferred"] == [1.0]
        assert score_continuations(editor.view, editor.encoder, [(fact.text, "English")])[0].exact
    assert torch.equal(logits(editor, fact.text), before)
