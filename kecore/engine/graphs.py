"""CUDA graphs: a function of tensors recorded once and replayed, without the host's work for each of its kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Function", "record"]

Function = Callable[..., Sequence[Tensor]]
"""Of tensors, with as many results each time."""


def record(function: Function, inputs: Sequence[Tensor]) -> Function:
    """The function as a CUDA graph for inputs of these shapes.

    A replay reads what the function closes over where it lay when it was recorded. Whatever else the function does on
    the host is done once, now. Call the function once before, for what libraries set up at their first use cannot be
    recorded.

    Raises:
        RuntimeError: it does something that cannot be recorded, such as reading a result on the host.
    """
    kept = [given.clone() for given in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(*kept)

    def replay(*given: Tensor) -> Sequence[Tensor]:
        for mine, theirs in zip(kept, given, strict=True):
            mine.copy_(theirs)
        graph.replay()
        return [result.clone() for result in results]  # the next replay writes where these lie

    return replay
