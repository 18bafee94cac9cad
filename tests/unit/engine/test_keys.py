"""Keys and movements against whole passes over single, unpadded prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kecore.api.types import EditRequest
from kecore.batch import RequestBatch
from kecore.engine.keys import Keys, Prompts, context_weights
from kecore.engine.solve import least_squares
from kecore.model import ModelView
from kecore.testing import Snapshot, tiny_model
from kecore.text import join_context

CONTEXTS = ("", "Therefore it is said", "I")
HALF = (0.5, 0.25, 0.25)  # the default: the bare prompt counts as much as all its contexts
LAYERS = (0, 1, 3)


def whole(world: Any, request: EditRequest, context: str) -> tuple[dict[int, Tensor], Tensor]:
    """Keys of the edited layers at the subject's last token, and the last edited layer's output there."""
    text = join_context(context, request.text)
    start = text.rindex(request.subject)
    encoded = world.encoder.encode(text)
    place = encoded.last_token_of((start, start + len(request.subject)))
    last = world.view.layers[LAYERS[-1]]
    keys: dict[int, Tensor] = {}
    moved: list[Tensor] = []

    def keep_key(layer: int) -> Any:
        def hook(_module: nn.Module, args: Any) -> None:
            keys[layer] = args[0].reshape(len(encoded.ids), -1)[place].clone()

        return hook

    def keep_output(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        moved.append(hidden.reshape(len(encoded.ids), -1)[place] / (last.residual_scale or 1.0))

    handles = [world.view.layers[i].site.linear.module.register_forward_pre_hook(keep_key(i)) for i in LAYERS]
    written = last.module if last.residual_scale is not None else last.site.linear.module
    handles.append(written.register_forward_hook(keep_output))
    try:
        world.view.model(input_ids=torch.tensor([encoded.ids]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return keys, moved[0]


def means(
    world: Any, facts: list[EditRequest], groups: list[int], weights: Sequence[float]
) -> tuple[dict[int, Tensor], Tensor]:
    """Per group, the mean over its requests of the weighted mean over contexts."""

    def mean(context: Callable[[str], tuple[dict[int, Tensor], Tensor]]) -> tuple[dict[int, Tensor], Tensor]:
        every = [context(prefix) for prefix in CONTEXTS]
        keys = {i: sum(w * k[i] for w, (k, _) in zip(weights, every, strict=True)) for i in LAYERS}
        return keys, sum(w * m for w, (_, m) in zip(weights, every, strict=True))

    found = [mean(partial(whole, world, fact)) for fact in facts]
    rows = [[item for group, item in zip(groups, found, strict=True) if group == g] for g in range(max(groups) + 1)]
    keys = {i: torch.stack([torch.stack([k[i] for k, _ in row]).mean(0) for row in rows]) for i in LAYERS}
    return keys, torch.stack([torch.stack([m for _, m in row]).mean(0) for row in rows])


def overlay(view: ModelView, layers: tuple[int, ...]) -> dict[nn.Parameter, Tensor]:
    generator = torch.Generator().manual_seed(3)
    parameters = [view.layers[i].site.linear.parameter for i in layers]
    return {p: p.data + 0.3 * torch.randn(p.shape, generator=generator) for p in parameters}


@pytest.mark.parametrize("memory", [2 << 30, 1], ids=["one-chunk", "row-by-row"])
def test_an_incremental_pass_equals_whole_ones(any_world: Any, facts: list[EditRequest], memory: int) -> None:
    check_pass(any_world, facts, memory)


@pytest.mark.parametrize(
    ("bare", "weights"), [(None, (1 / 3, 1 / 3, 1 / 3)), (0.8, (0.8, 0.1, 0.1)), (0.0, (0, 0.5, 0.5))]
)
def test_the_bare_prompt_has_the_weight_it_is_given(
    world: Any, facts: list[EditRequest], bare: float | None, weights: tuple[float, ...]
) -> None:
    with world.view.frozen(), torch.no_grad():
        keys = Prompts(world.view, RequestBatch.of(facts, world.encoder).ungrouped(), CONTEXTS, bare=bare).begin_pass(
            LAYERS
        )
        wanted, _ = means(world, facts, [0, 1, 2, 3], weights)
        torch.testing.assert_close(keys.advance(0)[0].mean(), wanted[0].t(), rtol=1e-4, atol=1e-5)


def test_a_bare_prompt_alone_has_all_the_weight(world: Any, facts: list[EditRequest]) -> None:
    with world.view.frozen():
        keys = Prompts(world.view, RequestBatch.of(facts[:1], world.encoder), ("",)).begin_pass(LAYERS)
    assert keys.weight.to_dense().tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("prefixes", "share", "weights"),
    [(0, 0.5, [1.0]), (2, None, [1.0, 1.0, 1.0]), (2, 0.5, [2.0, 1.0, 1.0]), (3, 0.0, [0.0, 1.0, 1.0, 1.0])],
)
def test_contexts_share_what_the_bare_prompt_leaves(prefixes: int, share: float | None, weights: list[float]) -> None:
    assert context_weights(prefixes, share) == weights


def test_layers_that_cannot_be_skipped(world: Any, facts: list[EditRequest]) -> None:
    fields = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    view = ModelView.of(tiny_model("gemma4_text", **fields))
    assert not view.skips
    check_pass(world._replace(view=view), facts, 1)


def test_texts_that_begin_alike_run_once(world: Any, facts: list[EditRequest]) -> None:
    twice = [facts[0], EditRequest("The capital of {} was", "France", "Rome"), facts[1]]
    with world.view.frozen():
        keys = Prompts(world.view, RequestBatch.of(twice, world.encoder), CONTEXTS).begin_pass(LAYERS)
        found, _ = keys.advance(0)
    assert found.rows.shape[0] == 2 * len(CONTEXTS)
    assert found.weight.sum(1).to_dense().tolist() == pytest.approx([1.0, 1.0])


def test_nothing_moves_and_nothing_is_left_without_an_update(any_world: Any, facts: list[EditRequest]) -> None:
    before = Snapshot(any_world.view.model)
    with any_world.view.frozen():
        keys = Prompts(any_world.view, RequestBatch.of(facts, any_world.encoder).ungrouped(), CONTEXTS).begin_pass(
            LAYERS
        )
        for layer in LAYERS:
            _, moved = keys.advance(layer)
            assert float(moved.abs().max()) < 1e-5
    assert before.differences() == []


def test_each_key_is_an_equation_of_its_groups_weighted_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.25, 0.25, 0.5]])
    keys = Keys(torch.randn(4, 6, generator=generator), weight)
    torch.testing.assert_close(keys.mean(), torch.stack([w @ keys.rows for w in weight]).t())
    columns, shares = keys.each()
    update = torch.randn(3, 6, generator=generator)
    residuals = torch.randn(3, 2, generator=generator)
    got = (update @ columns - residuals @ shares.t()).square().sum()
    wanted = sum(
        float(weight[u, r]) * (update @ keys.rows[r] - residuals[:, u]).square().sum()
        for u in range(2)
        for r in range(4)
    )
    torch.testing.assert_close(got, wanted)


def test_thousands_of_keys_become_as_many_columns_as_they_have_coordinates() -> None:
    generator = torch.Generator().manual_seed(0)
    # Forty keys of seven coordinates, of which the last depends on the others.
    rows = torch.randn(40, 7, generator=generator)
    rows[:, 6] = rows[:, 0] - rows[:, 3]
    weight = torch.rand(10, 40, generator=generator) * (torch.rand(10, 40, generator=generator) < 0.2)
    keys = Keys(rows, weight)
    (every, shares), (few, theirs) = keys.each(), keys.each(compact=True)
    assert every.shape[1] == len(shares) == int((weight > 0).sum())
    assert few.shape == (7, 7)
    assert theirs.shape == (7, 10)
    torch.testing.assert_close(few @ few.t(), every @ every.t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(few @ theirs, every @ shares, rtol=1e-5, atol=1e-5)
    some = Keys(rows[:3], torch.eye(3))
    assert all(torch.equal(a, b) for a, b in zip(some.each(compact=True), some.each(), strict=True))


def test_thousands_of_facts_are_solved_alike() -> None:
    generator = torch.Generator().manual_seed(1)
    keys = Keys(torch.randn(60, 8, generator=generator), torch.eye(20).repeat_interleave(3, 1) / 3)
    residuals = torch.randn(5, 20, generator=generator)
    rows, values = keys.rows.double(), residuals.double().repeat_interleave(3, 1)
    wanted = (values / 3) @ rows @ torch.linalg.inv(0.7 * torch.eye(8) + rows.t() @ rows / 3)
    found = least_squares(keys, residuals, None, 0.7, absolute=True)
    assert found.V.shape[1] <= 20
    torch.testing.assert_close((found.U @ found.V.t()).double(), wanted, rtol=1e-5, atol=1e-6)


def check_pass(world: Any, facts: list[EditRequest], memory: int) -> None:
    batch = RequestBatch.of(facts, world.encoder)
    groups = list(batch.groups)
    assert groups == [0, 1, 0, 2]
    with world.view.frozen(), torch.no_grad():
        _, before = means(world, facts, groups, HALF)
        keys = Prompts(world.view, batch, CONTEXTS, memory).begin_pass(LAYERS)
        for place, layer in enumerate(LAYERS):
            with world.view.overlay(overlay(world.view, LAYERS[:place])):
                found, moved = keys.advance(layer)
                wanted, after = means(world, facts, groups, HALF)
            torch.testing.assert_close(found.mean(), wanted[layer].t(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(moved, after - before, rtol=1e-4, atol=2e-5)
            assert place == 0 or float(moved.norm()) > 0.1
