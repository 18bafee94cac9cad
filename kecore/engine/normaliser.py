"""A module that gives each coordinate of a vector mean zero and variance one, by statistics fixed in advance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Normaliser"]

_LEAST_DEVIATION = 1e-3  # of the root mean square of all deviations
_TINY = 1e-30


class Normaliser(nn.Module):
    """Normalises each coordinate of ``[..., width]``; until it has observed anything, it changes nothing.

    Mean and deviation are buffers, so that they travel with the trained network that reads the normalised vectors.

    Args:
        width: number of coordinates.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.mean: Tensor
        self.deviation: Tensor

    def observe(self, vectors: Tensor) -> None:
        """Take the statistics of ``[n, width]``."""
        self.mean.copy_(vectors.mean(0))
        deviation = vectors.std(0, correction=0)
        # A coordinate that never moves carries nothing; dividing by its deviation would make it everything.
        least = _LEAST_DEVIATION * float(deviation.square().mean().sqrt()) + _TINY
        self.deviation.copy_(deviation.clamp(min=least))

    def forward(self, vectors: Tensor) -> Tensor:
        """Return ``[..., width]`` normalised."""
        return (vectors - self.mean) / self.deviation
