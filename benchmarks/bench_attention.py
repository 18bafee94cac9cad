"""Attention on a CPU: kecore's against torch's fused kernel behind copies of the grouped heads.

    pytest benchmarks/bench_attention.py --benchmark-enable --benchmark-columns=min,median

Both are checked against float64 first. The backward pass is that of a replay: a few queries over a prompt that is kept.
Packed text, as key statistics have it, is causal without a mask.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kecore_cpu.attention import attention

# rows, queries, keys: the second is a replay's shape.
SHAPES = {"scores": (128, 16, 16), "replay": (140, 6, 30), "long": (16, 128, 128)}
HEADS, GROUPS, WIDTH = 9, 3, 64


class Module(nn.Module):
    """What transformers' function asks of an attention module."""

    is_causal = True
    num_key_value_groups = HEADS // GROUPS
    training = False


def given(shape: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, keys, values and mask."""
    rows, t, s = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(rows, heads, n, WIDTH, generator=generator).to(dtype).requires_grad_()
        for heads, n in ((HEADS, t), (GROUPS, s), (GROUPS, s))
    ]
    return (*parts, torch.ones(rows, 1, t, s, dtype=torch.bool).tril(s - t))


def theirs(*given: Any) -> tuple[Tensor, None]:
    """What transformers does for ``sdpa``."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(*given)


@pytest.mark.parametrize("which", ["kecore", "torch"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(benchmark: Any, shape: str, dtype: torch.dtype, direction: str, which: str) -> None:
    function = attention if which == "kecore" else theirs
    operands = given(shape, dtype)
    exact = attention(Module(), *(x.detach().double() for x in operands[:3]), operands[3])[0]
    found = function(Module(), *operands)[0]
    error = float((found.detach().double() - exact).norm() / exact.norm())
    assert error < (1e-6 if dtype == torch.float32 else 2e-2)
    benchmark.group = f"{shape} {direction} {dtype}"
    benchmark.extra_info["relative_error"] = error

    def forward() -> None:
        with torch.no_grad():
            function(Module(), *operands)

    def backward() -> None:
        torch.autograd.grad(function(Module(), *operands)[0].sum(), operands[:3])

    benchmark(forward if direction == "forward" else backward)


@pytest.mark.parametrize("which", ["kecore", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_packed_text(benchmark: Any, dtype: torch.dtype, which: str) -> None:
    function = attention if which == "kecore" else theirs
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(4, heads, 512, WIDTH, generator=generator).to(dtype) for heads in (HEADS, GROUPS, GROUPS)]
    exact = theirs(Module(), *(x.double() for x in operands), None)[0]
    error = float((function(Module(), *operands, None)[0].double() - exact).norm() / exact.norm())
    assert error < (1e-6 if dtype == torch.float32 else 2e-2)
    benchmark.group = f"packed text {dtype}"
    benchmark.extra_info["relative_error"] = error
    benchmark(function, Module(), *operands, None)
