"""CUDA graphs: a function of tensors recorded once and replayed, without the host's work for each of its kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Function", "record"]

Function = Callable[..., Sequence[Tensor]]
"""A function of tensors that returns as many tensors each time."""


def record(function: Function, inputs: Sequence[Tensor]) -> Function:
    """Record a function as a CUDA graph for inputs of these shapes, and return what replays it.

    A replay reads what the function closes over where it lay when it was recorded. Whatever else the function does on
    the host is done once, now. Call the function once before, for what libraries set up at their first use cannot be
    recorded.

    Raises:
        RuntimeError: it does something that cannot be recorded, such as reading a result on the host.
    """
    recorded_inputs = [tensor.clone() for tensor in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(*recorded_inputs)

    def replay(*new_inputs: Tensor) -> Sequence[Tensor]:
        for recorded, new in zip(recorded_inputs, new_inputs, strict=True):
            recorded.copy_(new)
        graph.replay()
        return [result.clone() for result in results]  # the next replay writes where these lie

    return replay
