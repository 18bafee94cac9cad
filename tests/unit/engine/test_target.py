"""Values before they are written: their norm, and what they ask of the layers above."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kecore import EditRequest
from kecore.engine.keys import KeyPass
from kecore.engine.locate import locate
from kecore.engine.target import ForwardReplay, norm_anchored
from kecore.model import ModelView
from kecore.testing import tiny_model, tiny_tokenizer
from kecore.text import Encoder

FACTS = [
    EditRequest("The company of {}", "Tim Cook", "French"),
    EditRequest("The capital of {}", "France", "Rome"),
    EditRequest("A river in {}:", "France", "Danube"),
]
CONTEXTS = ("", "The sun")


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_values_norm_is_that_of_the_first_edit() -> None:
    state: dict[str, torch.Tensor] = {}
    now, delta = random(4, 8, seed=1), random(4, 8, seed=2)
    nas = norm_anchored()
    first = nas(2, lambda: now, delta, state)
    anchor = (now + delta).norm(dim=1).mean()
    value = now + first
    torch.testing.assert_close(value.norm(dim=1), anchor.expand(4))
    torch.testing.assert_close(torch.cosine_similarity(value, now + delta), torch.ones(4))
    grown = nas(2, lambda: 7 * now, 9 * delta, state)
    torch.testing.assert_close((7 * now + grown).norm(dim=1), anchor.expand(4))


@pytest.mark.parametrize(("count", "left"), [(19, 19), (20, 19), (43, 41)])
def test_the_anchor_leaves_the_longest_twentieth_out(count: int, left: int) -> None:
    """NAS as released: of ``n`` lengths the ``⌊n / 20⌋`` largest do not count."""
    lengths = torch.arange(1.0, count + 1)
    value = torch.nn.functional.normalize(random(count, 6, seed=1), dim=1) * lengths[torch.randperm(count)][:, None]
    state: dict[str, torch.Tensor] = {}
    norm_anchored()(2, lambda: torch.zeros(count, 6), value, state)
    assert float(state["nas/anchor/2"]) == pytest.approx((left + 1) / 2)


def test_an_anchor_may_be_given() -> None:
    """That of a thousand pilot edits, say, which the paper takes."""
    state = {"nas/anchor/2": torch.tensor(99.0)}
    now, delta = random(3, 8, seed=1), random(3, 8, seed=2)
    value = now + norm_anchored(2.5)(2, lambda: now, delta, state)
    torch.testing.assert_close(value.norm(dim=1), torch.full((3,), 2.5))
    assert float(state["nas/anchor/2"]) == 2.5


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_later_targets_are_what_the_values_make_of_each_prompt(architecture: str) -> None:
    """Against one prompt at a time, unpadded, with a hook of the test's own and transformers' hidden states."""
    view = ModelView.of(tiny_model(architecture))
    encoder = Encoder(tiny_tokenizer("byte-bpe" if architecture == "gpt2" else "llama-like"))
    groups, layers = [0, 1, 1], (0, 1, 2)
    delta = 0.5 * random(2, view.width, seed=3)
    with view.frozen(), torch.no_grad():
        passes = partial(KeyPass, view, encoder, FACTS, groups, CONTEXTS)
        replay = ForwardReplay(view, passes, layers, delta)
        found = [replay.advance(layer) for layer in layers]
        change = torch.zeros(3, 2, view.width)
        weight = {0: 0.5, 1: 0.5}  # the bare prompt's, and that of the one context
        for item in locate(encoder, FACTS, CONTEXTS, target=False):
            ids = torch.tensor([item.encoded.ids[: item.lookup + 1]])
            plain = view.model(ids, output_hidden_states=True).hidden_states
            added = delta[groups[item.request]]
            hook = view.layers[0].value_projection.module.register_forward_hook(
                lambda _m, _i, output, added=added: torch.cat([output[:, :-1], output[:, -1:] + added], 1)
            )
            moved = view.model(ids, output_hidden_states=True).hidden_states
            hook.remove()
            group = groups[item.request]
            for place, layer in enumerate(layers):
                # hidden_states begins with the embeddings; both requests about France count half.
                step = (moved[layer + 1] - plain[layer + 1])[0, -1] * weight[item.context] / groups.count(group)
                change[place, group] += step
    for place, (keys, missing) in enumerate(found):
        torch.testing.assert_close(missing, change[place], atol=1e-5, rtol=1e-4)
        expected = passes((place,)).advance(place)[0]
        torch.testing.assert_close(keys.rows, expected.rows)
    assert float((change[2] - change[0]).norm()) > 0.01
