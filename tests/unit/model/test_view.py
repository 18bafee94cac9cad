"""Passes in pieces, beyond what tests/integration/test_architectures.py asks of every architecture."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kecore.api.errors import LayerError
from kecore.model import ModelView
from kecore.testing import Snapshot, tiny_model, tiny_tokenizer
from kecore.text import Encoder, Rows

IDS = [[30, 210, 77, 401, 5, 99], [8, 450, 63]]
ENDS = [5, 2]


def view_of(architecture: str) -> ModelView:
    return ModelView.of(tiny_model(architecture))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(tiny_tokenizer())


@pytest.fixture(params=["llama", "gpt2", "bart"])
def view(request: pytest.FixtureRequest) -> ModelView:
    """A gated one, one with Conv1D, and one that takes no padding on the left."""
    return view_of(request.param)


def alone(view: ModelView, ids: list[int]) -> Tensor:
    with view.frozen(), torch.no_grad():
        return view.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def test_change_is_the_weight_that_makes_it(view: ModelView, encoder: Encoder) -> None:
    """Doubling a projection's output is doubling its weight and bias."""
    rows = encoder.rows(IDS, ENDS)
    place = (torch.arange(2), rows.offset + torch.tensor(ENDS))
    projection = view.layers[2].value_projection.module
    twice = {p: 2 * p.data for p in projection.parameters()}
    with view.frozen(), torch.no_grad():
        changed = view.forward(rows, change={2: lambda x: 2 * x}, at=place, values=[2])
        with view.overlay(twice):
            overlaid = view.forward(rows, at=place, values=[2])
        unchanged = view.forward(rows, at=place)
    assert changed.logits is not None
    assert overlaid.logits is not None
    torch.testing.assert_close(changed.logits, overlaid.logits)
    assert not torch.allclose(changed.logits, unchanged.logits, atol=1e-2)


def test_change_sees_rows_in_the_callers_layout(view: ModelView, encoder: Encoder) -> None:
    rows = encoder.rows(IDS, ENDS)
    seen: list[Tensor] = []

    def look(output: Tensor) -> Tensor:
        seen.append(output.detach().clone())
        return output

    with view.frozen(), torch.no_grad():
        values = view.forward(rows, change={1: look}, values=[1]).values[1]
    real = rows.attention_mask.bool()
    assert torch.equal(seen[0][real], values[real])


def test_cache_continues_a_pass(encoder: Encoder) -> None:
    view = view_of("llama")
    rows = encoder.rows(IDS, ENDS)
    before = Rows(rows.input_ids[:, :3], rows.attention_mask[:, :3], rows.offset)
    after = Rows(rows.input_ids[:, 3:], rows.attention_mask[:, 3:], torch.zeros(2, dtype=torch.long))
    with view.frozen(), torch.no_grad():
        cache = view.forward(before, use_cache=True).cache
        logits = view.forward(after, past=(cache, rows.attention_mask)).logits
        assert view.forward(before).cache is None
    assert logits is not None
    torch.testing.assert_close(logits[0], alone(view, IDS[0])[3:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[1], alone(view, IDS[1]), rtol=1e-4, atol=1e-5)


def test_a_model_that_takes_no_left_padding_hands_out_no_cache(encoder: Encoder) -> None:
    view = view_of("bart")
    assert view.forward(encoder.rows(IDS, ENDS), use_cache=True).cache is None


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_wrong_cache_is_not_handed_out(architecture: str, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    original = DynamicCache.update

    def spoiled(self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(self, keys, 1.01 * values, *args, **kwargs)

    sound, wrong = view_of(architecture), view_of(architecture)
    rows = encoder.rows(IDS, ENDS)
    with torch.no_grad():
        assert sound.forward(rows, use_cache=True).cache is not None
        monkeypatch.setattr(DynamicCache, "update", spoiled)
        assert wrong.forward(rows, use_cache=True).cache is None


def test_stopping_runs_nothing_above(view: ModelView, encoder: Encoder) -> None:
    ran: list[int] = []
    for part in view.layers:
        part.module.register_forward_hook(lambda *_, index=part.index: ran.append(index))
    view.forward(encoder.rows(IDS), stop=1)
    assert ran == [0, 1]
    ran.clear()
    hidden = view.forward(encoder.rows(IDS), stop=2, hidden=[2]).hidden[2]
    ran.clear()
    view.forward(encoder.rows(IDS), resume=(3, hidden))
    assert [index for index in ran if index == 3] == [3]


def test_only_wanted_places_go_through_the_unembedding(encoder: Encoder) -> None:
    view = view_of("llama")
    shapes: list[tuple[int, ...]] = []
    view.unembedding.register_forward_hook(lambda _m, args, _output: shapes.append(tuple(args[0].shape)))
    row, column = torch.tensor([1, 0, 0]), torch.tensor([2, 5, 1])
    logits = view.logits_at(encoder.rows(IDS), row, column)
    assert shapes == [(1, 3, 32)]
    assert not logits.requires_grad
    expected = torch.stack([alone(view, IDS[r])[c] for r, c in zip(row.tolist(), column.tolist(), strict=True)])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


class Boom(Exception):
    pass


@pytest.mark.parametrize("where", ["model", "change", "unembedding"])
def test_a_pass_that_fails_leaves_no_trace(view: ModelView, encoder: Encoder, where: str) -> None:
    def boom(*_: object) -> Tensor:
        raise Boom

    module = {"model": view.layers[3].module, "unembedding": view.unembedding}.get(where)
    handle = module.register_forward_hook(boom) if module is not None else None
    view.model.train()
    before = Snapshot(view.model)
    rows = encoder.rows(IDS)
    hidden = torch.zeros(*rows.input_ids.shape, view.width)
    overlay = {p.value_projection.parameter: torch.zeros_like(p.value_projection.parameter) for p in view.layers}
    every = range(4)
    with pytest.raises(Boom), view.frozen(), view.overlay(overlay):
        view.forward(
            rows,
            resume=(2, hidden),
            hidden=every[2:],
            keys=every[2:],
            values=every[2:],
            change={3: boom} if where == "change" else {},
            at=(torch.tensor([0]), torch.tensor([0])),
        )
    assert before.differences() == []
    if handle is not None:
        handle.remove()


def test_gradients_reach_what_a_change_adds(encoder: Encoder) -> None:
    view = view_of("gpt2")
    delta = torch.zeros(view.width, requires_grad=True)
    with view.frozen():
        logits = view.forward(encoder.rows(IDS), change={1: lambda x: x + delta}).logits
        assert logits is not None
        (gradient,) = torch.autograd.grad(logits.logsumexp(-1).sum(), delta)
    assert float(gradient.norm()) > 0
    assert all(parameter.grad is None for parameter in view.model.parameters())


def test_layers_by_index() -> None:
    view = view_of("llama")
    assert view.layer(3) is view.layers[3]
    for index in (-1, 4):
        with pytest.raises(LayerError, match=f"layer {index} was asked for; the model has layers 0 to 3"):
            view.layer(index)
    with pytest.raises(FrozenInstanceError):
        view.layers[0].index = 1  # type: ignore[misc]


def test_context_length() -> None:
    assert view_of("gpt2").max_length == 256
    assert view_of("bloom").max_length is None
