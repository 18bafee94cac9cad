"""Attributions equal integrated gradients worked out step by step on the plain model, and obey their axiom."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kecore.model import ModelView
from kecore.testing import tiny_model, tiny_tokenizer
from kecore.testing.snapshot import Snapshot
from kecore.text import Encoder
from kecore_methods.locate.neurons import Attributions, attribute, knowledge_neurons, next_tokens

PROMPTS = ["The capital of France is", "Where does the Danube flow? It flows to", "Tim Cook"]


def with_activations(world: Any, prompt: str, layer: int, answer: int, activations: Tensor | None) -> Any:
    """Probability of an answer with other activations at the last token, and those that are there."""
    ids = torch.tensor([world.encoder.encode(prompt).ids])
    seen: list[Tensor] = []

    def before(_module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        seen.append(args[0].reshape(-1, args[0].shape[-1])[-1].detach())
        if activations is None:
            return args
        x = args[0].clone()
        x.view(-1, x.shape[-1])[-1] = activations
        return (x,)

    handle = world.view.layers[layer].site.linear.module.register_forward_pre_hook(before)
    try:
        logits = world.view.model(input_ids=ids, use_cache=False).logits[0, -1]
    finally:
        handle.remove()
    return logits.softmax(-1)[answer], seen[0]


@pytest.mark.filterwarnings("ignore::kecore.api.errors.KecoreWarning")  # one of the models has no cache and says so
def test_attributions_are_the_published_sum(any_world: Any) -> None:
    """``w / m`` times the sum of gradients at ``k / m w``, one step, layer and prompt at a time."""
    world, steps = any_world, 3
    answers = next_tokens(world.view, world.encoder, PROMPTS)
    before = Snapshot(world.view.model)
    found = attribute(world.view, world.encoder, PROMPTS, answers, steps=steps, memory=1 << 20)
    assert not before.differences()
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        for layer in range(4):
            with torch.no_grad():
                clean, activations = with_activations(world, prompt, layer, answer, None)
            assert float(found.clean[row]) == pytest.approx(float(clean), rel=1e-4)
            assert torch.allclose(found.activations[layer][row], activations, rtol=1e-4, atol=1e-5)
            total = torch.zeros_like(activations)
            for k in range(1, steps + 1):
                point = (k / steps * activations).requires_grad_()
                probability, _ = with_activations(world, prompt, layer, answer, point)
                total += torch.autograd.grad(probability, point)[0]
            expected = activations * total / steps
            assert float((found.scores[layer][row] - expected).norm()) < 2e-3 * float(expected.norm())


def test_attributions_of_a_layer_add_up() -> None:
    """Completeness: with many steps they are the probability, less that without any activation of the layer."""
    world = SimpleNamespace(view=ModelView.of(tiny_model("llama").double()), encoder=Encoder(tiny_tokenizer()))
    answers = next_tokens(world.view, world.encoder, PROMPTS[:1])
    found = attribute(world.view, world.encoder, PROMPTS[:1], answers, steps=400)
    for layer in range(4):
        width = found.scores[layer].shape[1]
        with torch.no_grad():
            clean, _ = with_activations(world, PROMPTS[0], layer, answers[0], None)
            empty, _ = with_activations(world, PROMPTS[0], layer, answers[0], torch.zeros(width).double())
        assert abs(float(clean - empty)) > 1e-4
        assert float(found.scores[layer].sum()) == pytest.approx(float(clean - empty), rel=0.02)


def made(*scores: list[list[float]]) -> Attributions:
    """Attributions by layer, ``[prompts, d_in]``."""
    tensors = tuple(torch.tensor(rows) for rows in scores)
    return Attributions(torch.ones(len(scores[0])), tensors, tuple(torch.ones_like(t) for t in tensors))


def test_neurons_are_shared_by_prompts() -> None:
    first = [[1.0, 0.1, 0.5], [0.9, 0.3, 0.1], [0.8, 0.0, 0.1], [1.0, -1.0, 0.1], [1.0, 0.0, 0.0]]
    second = [[0.3, 0.0], [0.3, 0.0], [0.3, 0.0], [0.1, 0.0], [0.0, 0.0]]
    found = knowledge_neurons(made(first, second), threshold=0.2, share=0.4)
    assert [(n.layer, n.index, n.share) for n in found] == [(0, 0, 1.0), (1, 0, 0.6)]
    assert found[1].attribution == pytest.approx(0.2)
    # 0.9 would leave one neuron: the share falls until there are two, and not three.
    assert [(n.layer, n.index) for n in knowledge_neurons(made(first, second), share=0.9)] == [(0, 0), (1, 0)]
    assert len(knowledge_neurons(made(first, second), share=0.9, least=1)) == 1
    assert len(knowledge_neurons(made(first, second), share=0.0)) == 4


def test_the_threshold_is_relative_to_each_prompt() -> None:
    rows = [[10.0, 1.0, 3.0], [0.1, 0.09, 0.001]]
    assert [n.index for n in knowledge_neurons(made(rows), share=0.5, least=1)] == [0]  # 1 and 2 count in one prompt
    assert [n.index for n in knowledge_neurons(made(rows), threshold=0.05, share=0.5)] == [0, 1]


def test_no_neuron_speaks_for_an_answer_that_all_of_them_oppose() -> None:
    assert knowledge_neurons(made([[-1.0, 0.0], [0.0, -2.0]])) == []
