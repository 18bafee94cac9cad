"""PMET's targets: two vectors a fact, against a plain loop over prompts with hooks on the whole model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kecore.api.types import EditRequest
from kecore.batch import RequestBatch
from kecore.engine.value_steps import ValueSettings
from kecore.engine.values import optimise_values
from kecore.model.mixer import mixer
from kecore.text import join_context

CONTEXTS = ("", "Therefore it is said", "I know")
LAYER = 1
SETTINGS = ValueSettings(
    steps=7,
    optimizer="adam",
    learning_rate=0.3,
    clamp=0.6,
    kl_weight=0.0,
    weight_decay=0.5,
    stop_loss=0.0,
    length_penalty=0.3,
    noise=0.0,
    beside=mixer,
)


def run(world: Any, ids: tuple[int, ...], lookup: int, vectors: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities with the vectors added at the lookup token, and what the two modules gave there."""
    modules = [world.view.layers[LAYER].site.linear.module, mixer(world.view, LAYER)]
    given: list[Tensor] = []

    def hook(vector: Tensor) -> Any:
        def change(_module: nn.Module, _args: Any, output: Any) -> Any:
            state = output if isinstance(output, Tensor) else output[0]
            given.append(state.reshape(len(ids), -1)[lookup].detach())
            place = torch.zeros(len(ids), 1)
            place[lookup] = 1
            new = state + (place * vector).reshape(state.shape)
            return new if isinstance(output, Tensor) else (new, *output[1:])

        return change

    # The attention runs first in one architecture and not in another, so each hook keeps to its own module.
    order = [modules[0].register_forward_hook(hook(vectors[0])), modules[1].register_forward_hook(hook(vectors[1]))]
    try:
        logits = world.view.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        for handle in order:
            handle.remove()
    return logits.log_softmax(-1), given


@pytest.fixture
def fact(facts: list[EditRequest]) -> EditRequest:
    return facts[1]


def serial(world: Any, fact: EditRequest) -> Tensor:
    """Both vectors after the steps, ``[2, d_model]``: Adam, decay and clamp relative to each module's own output."""
    rows: list[tuple[tuple[int, ...], int, int]] = []
    for context in CONTEXTS:
        text = join_context(context, fact.text)
        start = text.rindex(fact.subject)
        encoded = world.encoder.encode(text, fact.target)
        rows.append((encoded.ids, encoded.last_token_of((start, start + len(fact.subject))), encoded.start))
    zero = torch.zeros(2, world.view.width)
    with torch.no_grad():
        given = run(world, *rows[0][:2], zero)[1]
    # The attention's hook fires first.
    norms = torch.stack([given[1], given[0]]).norm(dim=1)
    vectors = zero.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([vectors], lr=SETTINGS.learning_rate)
    for _ in range(SETTINGS.steps - 1):
        optimiser.zero_grad()
        losses = []
        for ids, lookup, start in rows:
            found = run(world, ids, lookup, vectors)[0]
            losses.append(-found[torch.arange(start - 1, len(ids) - 1), list(ids[start:])].mean())
        lengths = vectors.norm(dim=1)
        decay = SETTINGS.weight_decay * lengths / norms**2 + SETTINGS.length_penalty * lengths / norms
        (torch.stack(losses).mean() + decay.sum()).backward()
        optimiser.step()
        with torch.no_grad():
            scale = (SETTINGS.clamp * norms / vectors.norm(dim=1)).clamp(max=1.0)
            vectors *= scale[:, None]
    return vectors.detach()


def test_both_vectors_follow_the_plain_loop(world: Any, facts: list[EditRequest], fact: EditRequest) -> None:
    wanted = serial(world, fact)
    found = optimise_values(world.view, RequestBatch.of([facts[3], fact], world.encoder), LAYER, CONTEXTS, SETTINGS)
    assert found.delta.shape == (2, world.view.width)
    torch.testing.assert_close(found.delta[1], wanted[0], rtol=2e-3, atol=2e-4)


def test_the_second_vector_takes_a_part(world: Any, facts: list[EditRequest], fact: EditRequest) -> None:
    """Without the attention's vector the other is another one: the loop above would notice if it were left out."""
    both = optimise_values(world.view, RequestBatch.of([fact], world.encoder), LAYER, CONTEXTS, SETTINGS)
    one = optimise_values(
        world.view, RequestBatch.of([fact], world.encoder), LAYER, CONTEXTS, replace(SETTINGS, beside=None)
    )
    assert float((both.delta - one.delta).norm() / one.delta.norm()) > 0.05
