"""Lifelong normalisation against its definitions: gradients by autograd on the weights, statistics in one go."""

from __future__ import annotations

import pytest
import torch

from kecore import EditRequest
from kecore.model import ModelView
from kecore.testing import tiny_model, tiny_tokenizer
from kecore.text import Encoder
from kecore_methods.locate.lifelong import Running, features, value_matrices

FACTS = [
    EditRequest("The company of {} is", "Tim Cook", "French people"),
    EditRequest("The capital of {}", "France", "Rome"),
]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_keys_times_gradients_are_the_weights_gradient(architecture: str, memory: int) -> None:
    """At the top, where no later layer mixes tokens, the predicting ones' outer products add up to all of it."""
    view = ModelView.of(tiny_model(architecture))
    encoder = Encoder(tiny_tokenizer("byte-bpe" if architecture == "gpt2" else "llama-like"))
    texts = [encoder.encode(fact.text, fact.target) for fact in FACTS]
    top = len(view.layers) - 1
    with view.frozen():
        lower, upper = features(view, encoder, texts, value_matrices(view, (1, top)), memory)
    assert [len(upper.keys), len(lower.gradients)] == [sum(len(t.ids) - t.start for t in texts)] * 2
    projection = view.layers[top].site.linear
    total = torch.zeros(projection.d_out, projection.d_in)
    for text in texts:
        ids = torch.tensor([text.ids])
        nll = -view.model(ids).logits[0].log_softmax(-1)
        loss = sum(nll[i - 1, text.ids[i]] for i in range(text.start, len(text.ids)))
        (gradient,) = torch.autograd.grad(loss, projection.parameter)
        total += gradient.t() if projection.transposed else gradient
    torch.testing.assert_close(upper.gradients.t() @ upper.keys, total, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("full", [False, True])
def test_running_statistics_are_those_of_everything_and_a_zero(full: bool) -> None:
    state: dict[str, torch.Tensor] = {}
    every = 3 + 2 * random(40, 5, seed=1)
    for part in (every[:1], every[1:11], every[11:]):
        Running(state, "x", full=full).add(part)
    running = Running(state, "x", full=full)
    seen = torch.cat([torch.zeros(1, 5), every]).double()
    assert running.count == 41
    new = random(3, 5, seed=2).double()
    expected = (new - seen.mean(0)) / seen.std(0, correction=0)
    torch.testing.assert_close(running.normalised(new), expected, rtol=1e-5, atol=1e-6)
    if full:
        covariance = torch.cov(seen.t(), correction=0)
        covariance += 0.2 * covariance.diagonal().mean() * torch.eye(5)
        # The symmetric root's inverse W is the only positive one with W C W = 1.
        root = running.whitened(torch.eye(5) + seen.mean(0), 0.2)
        torch.testing.assert_close(root, root.t(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(root @ covariance @ root, torch.eye(5).double(), rtol=1e-5, atol=1e-5)
        assert float(torch.linalg.eigvalsh(root).min()) > 0


def test_a_lone_token_has_a_direction() -> None:
    state: dict[str, torch.Tensor] = {}
    lone = random(1, 6, seed=3)
    Running(state, "x").add(lone)
    torch.testing.assert_close(Running(state, "x").normalised(lone), lone.sign().double())


def test_a_coordinate_that_never_moves_stays_where_it_is() -> None:
    state: dict[str, torch.Tensor] = {}
    vectors = random(4, 3, seed=4)
    vectors[:, 1] = 0
    Running(state, "x").add(vectors)
    assert bool((Running(state, "x").normalised(vectors)[:, 1] == 0).all())
