"""Float32 products of a frozen weight: torch's own, and oneDNN's as passes take them where AVX-512 is.

    pytest benchmarks/bench_gemm.py --benchmark-enable --benchmark-group-by=group

Shapes are those of SmolLM2-135M's feed-forward block with the rows of one fact, ten facts and a micro-batch.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn import functional

from kecore.model_view import gemm


@pytest.mark.parametrize("rows", [5, 35, 350, 1050])
@pytest.mark.parametrize("library", ["torch", "onednn"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_product(benchmark: Any, rows: int, library: str, direction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 576, generator=generator, requires_grad=direction == "backward")
    weight = torch.randn(1536, 576, generator=generator)
    upstream = torch.randn(rows, 1536, generator=generator)
    with gemm._Products() if library == "onednn" else nullcontext():
        y = functional.linear(x, weight)
        torch.testing.assert_close(
            y.detach(), (x.detach().double() @ weight.double().t()).float(), rtol=1e-5, atol=1e-4
        )

        def product() -> None:
            if direction == "forward":
                functional.linear(x, weight)
            else:
                torch.autograd.grad(y, x, upstream, retain_graph=True)

        benchmark.group = f"{direction}, {rows} rows"
        benchmark.extra_info["gflop"] = 2e-9 * rows * 576 * 1536
        benchmark(product)
