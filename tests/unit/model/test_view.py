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
from kecore.model.sites import Beside, Key, ModuleOutput, Output, Start, Value
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
    projection = view.layers[2].site.linear.module
    twice = {p: 2 * p.data for p in projection.parameters()}
    with view.frozen(), torch.no_grad():
        changed = view.run(rows, taps=[Value(2)], patches={Value(2): lambda x: 2 * x}, at=place)
        with view.overlay(twice):
            overlaid = view.run(rows, taps=[Value(2)], at=place)
        unchanged = view.run(rows, at=place)
    torch.testing.assert_close(changed.logits, overlaid.logits)
    assert not torch.allclose(changed.logits, unchanged.logits, atol=1e-2)


def test_change_sees_rows_in_the_callers_layout(view: ModelView, encoder: Encoder) -> None:
    rows = encoder.rows(IDS, ENDS)
    seen: list[Tensor] = []

    def look(output: Tensor) -> Tensor:
        seen.append(output.detach().clone())
        return output

    with view.frozen(), torch.no_grad():
        values = view.run(rows, taps=[Value(1)], patches={Value(1): look})[Value(1)]
    real = rows.attention_mask.bool()
    assert torch.equal(seen[0][real], values[real])


def test_cache_continues_a_pass(encoder: Encoder) -> None:
    view = view_of("llama")
    rows = encoder.rows(IDS, ENDS)
    before = Rows(rows.input_ids[:, :3], rows.attention_mask[:, :3], rows.offset)
    after = Rows(rows.input_ids[:, 3:], rows.attention_mask[:, 3:], torch.zeros(2, dtype=torch.long))
    with view.frozen(), torch.no_grad():
        cache = view.run(before, use_cache=True).cache
        logits = view.run(after, past=(cache, rows.attention_mask)).logits
        assert view.run(before).cache is None
    torch.testing.assert_close(logits[0], alone(view, IDS[0])[3:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[1], alone(view, IDS[1]), rtol=1e-4, atol=1e-5)


def test_a_model_that_takes_no_left_padding_hands_out_no_cache(encoder: Encoder) -> None:
    view = view_of("bart")
    assert view.run(encoder.rows(IDS, ENDS), use_cache=True).cache is None


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_wrong_cache_is_not_handed_out(architecture: str, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    original = DynamicCache.update

    def spoiled(self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(self, keys, 1.01 * values, *args, **kwargs)

    sound, wrong = view_of(architecture), view_of(architecture)
    rows = encoder.rows(IDS, ENDS)
    with torch.no_grad():
        assert sound.run(rows, use_cache=True).cache is not None
        monkeypatch.setattr(DynamicCache, "update", spoiled)
        assert wrong.run(rows, use_cache=True).cache is None


def test_stopping_runs_nothing_above(view: ModelView, encoder: Encoder) -> None:
    ran: list[int] = []
    for part in view.layers:
        part.module.register_forward_hook(lambda *_, index=part.index: ran.append(index))
    view.run(encoder.rows(IDS), last=1)
    assert ran == [0, 1]
    ran.clear()
    hidden = view.run(encoder.rows(IDS), taps=[Output(2)], last=2)[Output(2)]
    ran.clear()
    view.run(encoder.rows(IDS), first=Start(3, hidden))
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
    overlay = {p.site.linear.parameter: torch.zeros_like(p.site.linear.parameter) for p in view.layers}
    taps = [site(layer) for site in (Output, Key, Value) for layer in (2, 3)]
    with pytest.raises(Boom), view.frozen(), view.overlay(overlay):
        view.run(
            rows,
            taps=taps,
            patches={Value(3): boom} if where == "change" else {},
            first=Start(2, hidden),
            at=(torch.tensor([0]), torch.tensor([0])),
        )
    assert before.differences() == []
    if handle is not None:
        handle.remove()


def test_gradients_reach_what_a_change_adds(encoder: Encoder) -> None:
    view = view_of("gpt2")
    delta = torch.zeros(view.width, requires_grad=True)
    with view.frozen():
        logits = view.run(encoder.rows(IDS), patches={Value(1): lambda x: x + delta}).logits
        (gradient,) = torch.autograd.grad(logits.logsumexp(-1).sum(), delta)
    assert float(gradient.norm()) > 0
    assert all(parameter.grad is None for parameter in view.model.parameters())


@pytest.mark.parametrize("architecture", ["llama", "opt", "bloom"])
def test_what_acts_beside_is_the_weight_that_makes_it(architecture: str, encoder: Encoder) -> None:
    """A matrix beside a projection, and the function of keys that it is, are that matrix added to the weight."""
    view = view_of(architecture)
    projection = view.layers[1].site.linear
    delta = 0.1 * torch.randn(projection.d_out, projection.d_in, generator=torch.Generator().manual_seed(0))
    rows = encoder.rows(IDS, ENDS)
    with view.frozen(), torch.no_grad():
        real = rows.attention_mask.bool()
        added = delta.t() if projection.transposed else delta
        with view.overlay({projection.parameter: projection.parameter.data + added}):
            expected = view.run(rows).logits[real]
        for change in (delta, lambda keys: keys @ delta.t()):
            torch.testing.assert_close(view.run(rows, patches={Value(1): Beside(change)}).logits[real], expected)


def test_a_patch_of_a_key_is_what_the_projection_reads(view: ModelView, encoder: Encoder) -> None:
    rows = encoder.rows(IDS, ENDS)
    with view.frozen(), torch.no_grad():
        out = view.run(rows, taps=[Key(1), Value(1)], patches={Key(1): torch.zeros_like}, last=1)
        bias = getattr(view.layers[1].site.linear.module, "bias", None)
    expected = torch.zeros(view.width) if bias is None else bias.detach()
    assert torch.equal(out[Value(1)], expected.expand_as(out[Value(1)]))
    assert float(out[Key(1)].norm()) > 0  # a tap sees what the model made


def test_the_output_of_a_layer_is_that_of_its_module(view: ModelView, encoder: Encoder) -> None:
    rows, module = encoder.rows(IDS, ENDS), ModuleOutput(view.layers[1].module)
    with view.frozen(), torch.no_grad():
        out = view.run(rows, taps=[Output(1), module], last=1)
        assert torch.equal(out[Output(1)], out[module])
        changed = view.run(rows, taps=[Output(2)], patches={Output(1): lambda x: 2 * x}, last=2)
        same = view.run(rows, taps=[Output(2)], patches={module: lambda x: 2 * x}, last=2)
    assert torch.equal(changed[Output(2)], same[Output(2)])


def test_sites_out_of_reach_are_refused(view: ModelView, encoder: Encoder) -> None:
    rows = encoder.rows(IDS)
    with view.frozen(), torch.no_grad():
        with pytest.raises(LayerError, match=r"did not reach Key\(layer=3\)"):
            view.run(rows, taps=[Key(3)], last=1)
        with pytest.raises(LayerError, match="layer 9 was asked for"):
            view.run(rows, taps=[Output(9)])
        with pytest.raises(LayerError, match="before the logits"):
            _ = view.run(rows, last=1).logits


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
