"""Products by oneDNN: the same numbers, the same gradients, and nothing where they do not apply."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kecore.model import ModelView
from kecore.testing import tiny_model
from kecore_cpu import onednn
from kecore_cpu.onednn import products

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs that oneDNN got."""
    seen: list[tuple[int, ...]] = []
    product = onednn._product

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(tuple(x.shape))
        return product(x, weight, bias)

    monkeypatch.setattr(onednn, "_product", counted)
    monkeypatch.setattr(onednn, "_faster", lambda: True)
    return seen


def holding(weight: Tensor) -> nn.Module:
    """A model with one weight, of which type and device are asked."""
    model = nn.Module()
    model.weight = nn.Parameter(weight, requires_grad=False)
    return model


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 24), (5, 24), (3, 7, 24), (2, 3, 1, 24)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_linear_and_its_gradient(shape: tuple[int, ...], bias: bool, strided: bool, calls: list[Any]) -> None:
    x = random(*shape) if not strided else random(*shape[:-1], 2 * shape[-1])[..., ::2]
    weight, offset = random(40, 24, seed=1), random(40, seed=2) if bias else None
    x.requires_grad_(True)
    with products(holding(weight)):
        y = functional.linear(x, weight, offset)
    assert calls == [shape]
    expected = x.detach().double() @ weight.double().t() + (offset.double() if offset is not None else 0)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = random(*y.shape, seed=3)
    (gradient,) = torch.autograd.grad((y * upstream).sum(), x)
    torch.testing.assert_close(gradient.double(), upstream.double() @ weight.double(), rtol=1e-5, atol=1e-5)


def test_addmm_as_transformers_conv1d_calls_it(calls: list[Any]) -> None:
    bias, x, weight = random(40), random(5, 24, seed=1).requires_grad_(True), random(24, 40, seed=2)
    with products(holding(weight)):
        y = torch.addmm(bias, x, weight)
    torch.testing.assert_close(y, bias + x @ weight, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, weight.sum(1).expand(5, 24), rtol=1e-5, atol=1e-5)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (random(3, 8), nn.Parameter(random(4, 8)), None),
        (random(3, 8), random(4, 8), random(4).requires_grad_(True)),
        (random(3, 8).double(), random(4, 8).double(), None),
        (random(3, 8).bfloat16(), random(4, 8).bfloat16(), None),
        (random(0, 8), random(4, 8), None),
        (random(8), random(4, 8), None),
    ],
    ids=["trained weight", "trained bias", "float64", "bfloat16", "nothing", "one vector"],
)
def test_everything_else_is_left_to_torch(x: Tensor, weight: Tensor, bias: Tensor | None, calls: list[Any]) -> None:
    with products(holding(random(1, 1))):
        y = functional.linear(x, weight, bias)
    assert calls == []
    assert torch.equal(y, functional.linear(x, weight, bias))
    assert y.requires_grad == weight.requires_grad or bias is not None


@pytest.mark.parametrize("weight", [random(2, 2).bfloat16(), torch.empty(2, 2, device="meta")], ids=["type", "device"])
def test_other_types_and_devices_change_nothing(weight: Tensor, calls: list[Any]) -> None:
    with products(holding(weight)):
        functional.linear(random(2, 2), random(2, 2))
    assert calls == []


@pytest.mark.parametrize(("capability", "taken"), [("AVX512", 1), ("AVX512_VNNI", 1), ("AVX2", 0), ("DEFAULT", 0)])
def test_the_processor_decides(capability: str, taken: int, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of what `calls` says about the processor
    monkeypatch.setattr(
        onednn, "_product", lambda x, weight, bias: calls.append(x) or functional.linear(x, weight, bias)
    )
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    with products(holding(random(2, 2))):
        functional.linear(random(2, 2), random(2, 2))
    assert len(calls) == taken


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_models_products_go_through(architecture: str, calls: list[Any]) -> None:
    view = ModelView.of(tiny_model(architecture))
    from kecore.testing import tiny_tokenizer
    from kecore.text import Encoder

    rows = Encoder(tiny_tokenizer()).rows([[3, 4, 5], [6, 7]])
    expected = view.model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits
    with view.frozen(), torch.no_grad():
        got = view.run(rows).logits
    assert len(calls) > 2 * len(view.layers)
    assert got is not None
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
