"""Attention of short texts against torch's own in float64, and what becomes of a model's configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kecore import ModelView
from kecore.testing import tiny_model
from kecore.text import Rows
from kecore_cpu.attention import attention, by_groups


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **how: Any) -> Tensor:
    """torch's attention with the keys and values of a group repeated for each of its heads."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **how).transpose(1, 2)


class Layer(nn.Module):
    is_causal = True


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("kind", ["bool", "float", "none", "per head"])
def test_output_and_gradients_are_those_of_torch(groups: int, kind: str) -> None:
    q = random(3, 6, 4, 8, seed=1).requires_grad_()
    k, v = random(3, groups, 9, 8, seed=2).requires_grad_(), random(3, groups, 9, 5, seed=3).requires_grad_()
    seen = torch.rand(3, 1, 4, 9, generator=torch.Generator().manual_seed(4)) < 0.6
    seen[..., 0] = True
    masks = {"bool": seen, "float": random(1, 1, 4, 9, seed=5), "none": None, "per head": seen.expand(3, 6, 4, 9)}
    mask = masks[kind]
    got, weights = attention(Layer(), q, k, v, mask, scaling=0.3, is_causal=False)
    wanted = oracle(q, k, v, mask, scale=0.3)
    assert weights is None
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    by = random(3, 4, 6, 5, seed=6)
    for a, b in zip(torch.autograd.grad(got, (q, k, v), by), torch.autograd.grad(wanted, (q, k, v), by), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_without_a_mask_no_query_sees_later_keys() -> None:
    q, k, v = random(2, 4, 5, 8, seed=1), random(2, 2, 5, 8, seed=2), random(2, 2, 5, 8, seed=3)
    wanted = oracle(q, k, v, None, is_causal=True)
    torch.testing.assert_close(attention(Layer(), q, k, v, None)[0], wanted, rtol=1e-12, atol=1e-12)
    one = attention(Layer(), q[:, :, -1:], k, v, None)[0]  # a token that is written sees all that came before
    torch.testing.assert_close(one, wanted[:, -1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("t", [129, 192, 300])
def test_long_texts_go_by_blocks_of_queries(groups: int, t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random(2, 4, t, 8, seed=1), random(2, groups, t, 8, seed=2), random(2, groups, t, 5, seed=3)
    wanted = oracle(q, k, v, None, is_causal=True)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", None)
        got = attention(Layer(), q, k, v, None)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_long_texts_with_a_mask_or_a_gradient_go_to_transformers() -> None:
    t = 130
    q, k, v = random(1, 2, t, 8, seed=1), random(1, 2, t, 8, seed=2), random(1, 2, t, 8, seed=3)
    seen = torch.ones(t, t, dtype=torch.bool).tril(3)[None, None]
    with torch.no_grad():
        got = attention(Layer(), q, k, v, seen)[0]
        shorter = attention(Layer(), q, k[:, :, :-1], v[:, :, :-1], None)[0]
    torch.testing.assert_close(got, oracle(q, k, v, seen), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        shorter, oracle(q, k[:, :, :-1], v[:, :, :-1], None, is_causal=True), rtol=1e-12, atol=1e-12
    )
    q.requires_grad_()
    wanted = oracle(q, k, v, None, is_causal=True)
    by = torch.ones_like(wanted)
    (mine,) = torch.autograd.grad(attention(Layer(), q, k, v, None)[0], q, by)
    torch.testing.assert_close(mine, torch.autograd.grad(wanted, q, by)[0], rtol=1e-11, atol=1e-12)


def test_place_of_padding_that_sees_nothing_is_finite() -> None:
    q, k, v = random(1, 2, 3, 8, seed=1), random(1, 2, 3, 8, seed=2), random(1, 2, 3, 8, seed=3)
    mask = torch.tensor([[[[False] * 3, [False, True, False], [False, True, True]]]])
    got = attention(Layer(), q, k, v, mask)[0]
    assert bool(torch.isfinite(got).all())
    torch.testing.assert_close(got[:, 1:], oracle(q, k, v, mask)[:, 1:], rtol=1e-12, atol=1e-12)


def test_what_is_not_known_goes_to_transformers() -> None:
    q, k, v = random(2, 4, 5, 8, seed=1), random(2, 4, 5, 8, seed=2), random(2, 4, 5, 8, seed=3)
    bias, seen = random(2, 4, 5, 5, seed=4), torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    got = attention(Layer(), q, k, v, seen, position_bias=bias)[0]
    wanted = oracle(q, k, v, bias.masked_fill(~seen, torch.finfo(bias.dtype).min))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [5, 200])
def test_a_pass_is_the_models_own_and_its_configuration_is_as_before(width: int) -> None:
    model = tiny_model("llama")
    view = ModelView.of(model)
    ids = torch.arange(2 * width).reshape(2, width) % 50
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    rows = Rows(ids, mask, torch.tensor([2, 0]))
    with torch.no_grad():
        got = view.run(rows).logits
        wanted = model(input_ids=ids, attention_mask=mask, position_ids=rows.position_ids, use_cache=False).logits
    assert got is not None
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_configuration_comes_back_after_an_error() -> None:
    model = tiny_model("llama")
    inside = []

    def fail() -> None:
        with by_groups(model):
            inside.append(model.config._attn_implementation)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == ["kecore"]
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("own", ["eager", "flash_attention_2"])
def test_other_attention_is_left_alone(own: str) -> None:
    model = tiny_model("llama")
    model.config._attn_implementation_internal = own
    with by_groups(model):
        assert model.config._attn_implementation == own


def test_other_devices_are_left_alone() -> None:
    model = tiny_model("llama").to("meta")
    with by_groups(model):
        assert model.config._attn_implementation == "sdpa"
