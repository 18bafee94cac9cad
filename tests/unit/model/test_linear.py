from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kecore.model import LinearView
from kecore.model.linear import orientation


def linear(d_in: int, d_out: int, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(d_in, d_out, bias=bias)


def conv1d(d_in: int, d_out: int) -> Conv1D:
    torch.manual_seed(0)
    module = Conv1D(d_out, d_in)
    nn.init.normal_(module.bias)
    return module


def stores(module: nn.Module, d_in: int, dtype: torch.dtype = torch.float32) -> bool | None:
    module = module.to(dtype)
    x = torch.randn(2, 5, d_in, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        return orientation(module, x, module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("module", "d_in", "transposed"),
    [
        (linear(12, 7), 12, False),
        (linear(12, 7, bias=False), 12, False),
        (conv1d(12, 7), 12, True),
        (linear(9, 9), 9, False),  # square: only the values tell
        (conv1d(9, 9), 9, True),
        (linear(1500, 40), 1500, False),
    ],
    ids=["linear", "no-bias", "conv1d", "square-linear", "square-conv1d", "wide"],
)
def test_orientation_is_found_by_value(module: nn.Module, d_in: int, transposed: bool, dtype: torch.dtype) -> None:
    assert stores(module, d_in, dtype) is transposed


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 1.01 * super().forward(input)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 6, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    "module", [Scaled(6, 6), Packed(), nn.LayerNorm(6), nn.Identity()], ids=lambda m: type(m).__name__
)
def test_other_maps_have_none(module: nn.Module) -> None:
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert orientation(module, x, module(x)) is None


@pytest.mark.parametrize(("module", "transposed"), [(linear(12, 7), False), (conv1d(12, 7), True)])
def test_view_speaks_out_by_in_and_shares_memory(module: nn.Module, transposed: bool) -> None:
    view = LinearView(module, "x.weight", transposed)
    assert (view.d_out, view.d_in, tuple(view.weight.shape)) == (7, 12, (7, 12))
    assert view.parameter is module.weight
    view.weight[3, 5] = 42.0
    assert float(module.weight.detach()[(5, 3) if transposed else (3, 5)]) == 42.0


def test_a_parameter_that_was_replaced_by_a_tensor_is_not_taken_for_one() -> None:
    module = linear(3, 3)
    del module.weight
    module.weight = torch.zeros(3, 3)
    with pytest.raises(TypeError, match=r"x\.weight is no longer a parameter"):
        _ = LinearView(module, "x.weight", False).parameter
