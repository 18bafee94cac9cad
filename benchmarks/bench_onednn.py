"""Float32 products of frozen weights: torch's own, oneDNN's, and oneDNN's with weights kept in its own order.

    pytest benchmarks/bench_onednn.py --benchmark-enable --benchmark-group-by=group

Shapes are those of SmolLM2-135M's feed-forward block with the rows of one fact (28: four tokens of seven prompts), of a
few facts and of a micro-batch. As in a model, each product has a matrix of its own, which comes from memory. kecore
takes oneDNN's where AVX-512 is; the third way is one that it could take.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kecore_cpu import onednn

_LAYERS = 24


@pytest.mark.parametrize("rows", [5, 28, 70, 350, 1050])
@pytest.mark.parametrize("way", ["torch", "onednn", "onednn-ordered"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_product(benchmark: Any, rows: int, way: str, direction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = [torch.randn(1536, 576, generator=generator) for _ in range(_LAYERS)]
    if direction == "backward":  # a gradient times the weight, which is a product with its transpose
        plain = [weight.t() for weight in plain]
    x = torch.randn(rows, plain[0].shape[1], generator=generator)
    weights = plain
    if way == "onednn-ordered":
        weights = [torch.ops.mkldnn._reorder_linear_weight(weight, rows) for weight in plain]

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return functional.linear(x, weight) if way == "torch" else onednn._product(x, weight, None)

    for weight, own in zip(weights, plain, strict=True):
        wanted = x.double() @ own.double().t()
        assert (product(x, weight) - wanted).norm() < 1e-6 * wanted.norm()

    def products() -> None:
        for weight in weights:
            product(x, weight)

    benchmark.group = f"{direction}, {rows} rows"
    benchmark.extra_info["gflop"] = 2e-9 * _LAYERS * rows * 576 * 1536
    benchmark(products)
