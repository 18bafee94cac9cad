"""MEMIT-FE's targets: what the values of the first layer ask of the layers above."""

from __future__ import annotations

import pytest
import torch

from kecore import EditRequest
from kecore.batch import RequestBatch
from kecore.engine.keys import Prompts
from kecore.model import ModelView
from kecore.testing import tiny_model, tiny_tokenizer
from kecore.text import Encoder
from kecore_methods.locate.memit_fe import ForwardReplay

FACTS = [
    EditRequest("The company of {}", "Tim Cook", "French"),
    EditRequest("The capital of {}", "France", "Rome"),
    EditRequest("A river in {}:", "France", "Danube"),
]
CONTEXTS = ("", "The sun")


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_later_targets_are_what_the_values_make_of_each_prompt(architecture: str) -> None:
    """Against one prompt at a time, unpadded, with a hook of the test's own and transformers' hidden states."""
    view = ModelView.of(tiny_model(architecture))
    encoder = Encoder(tiny_tokenizer("byte-bpe" if architecture == "gpt2" else "llama-like"))
    batch, layers = RequestBatch.of(FACTS, encoder), (0, 1, 2)
    delta = 0.5 * random(2, view.width, seed=3)
    with view.frozen(), torch.no_grad():
        prompts = Prompts(view, batch, CONTEXTS, memory=2 << 30, bare=0.5)
        residuals = ForwardReplay().residuals(prompts, layers, delta)
        found = [residuals.read(layer) for layer in layers]
        change = torch.zeros(3, 2, view.width)
        weight = dict.fromkeys(CONTEXTS, 0.5)  # the bare prompt's, and that of the one context
        texts = [(c, group, item) for c in CONTEXTS for group, item in zip((0, 1, 1), batch.located(c), strict=True)]
        for context, group, item in texts:
            ids = torch.tensor([item.ids[: item.lookup + 1]])
            plain = view.model(ids, output_hidden_states=True).hidden_states
            added = delta[group]
            hook = view.layers[0].site.linear.module.register_forward_hook(
                lambda _m, _i, output, added=added: torch.cat([output[:, :-1], output[:, -1:] + added], 1)
            )
            moved = view.model(ids, output_hidden_states=True).hidden_states
            hook.remove()
            for place, layer in enumerate(layers):
                # hidden_states begins with the embeddings; both requests about France count half.
                step = (moved[layer + 1] - plain[layer + 1])[0, -1] * weight[context] / (1, 2)[group]
                change[place, group] += step
    for place, (keys, missing) in enumerate(found):
        torch.testing.assert_close(missing, change[place], atol=1e-5, rtol=1e-4)
        expected = prompts.begin_pass((place,)).advance(place)[0]
        torch.testing.assert_close(keys.rows, expected.rows)
    assert float((change[2] - change[0]).norm()) > 0.01
