"""MEND: a small network maps the factors of a fine-tuning gradient to those of an edit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from kecore.model import ModelView
from kecore.text import Encoded
from kecore_methods.meta.factors import Factors, Shifts, grouped, unit_step
from kecore_methods.meta.learner import GradientConfig, GradientEditor, Network

__all__ = ["Mend", "MendConfig", "Normaliser", "SharedMLP"]


class MendConfig(GradientConfig):
    """Configuration; the paper's numbers where they do not depend on the model's size."""

    rank: int = Field(default=128, ge=1, description="Rank of the network's two maps (1920 in the paper).")
    edit_rate: float = Field(
        default=0.05,
        gt=0,
        description="First step of an edit: size of one token's update beside what the matrix does to a key.",
    )
    rate_learning_rate: float = Field(default=0.1, gt=0, description="Of Adam, for the logarithm of that step.")


class Normaliser(nn.Module):
    """Zero mean and unit variance for each coordinate of ``u`` and ``δ`` (section 3.2), statistics fixed in advance."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.mean: Tensor
        self.deviation: Tensor

    def observe(self, x: Tensor) -> None:
        """Take the statistics of ``[n, width]``."""
        self.mean.copy_(x.mean(0))
        deviation = x.std(0, correction=0)
        # A coordinate that never moves carries nothing; dividing by its deviation would make it everything.
        self.deviation.copy_(deviation.clamp(min=1e-3 * float(deviation.square().mean().sqrt()) + 1e-30))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` normalised."""
        return (x - self.mean) / self.deviation


class SharedMLP(nn.Module):
    """One hidden layer with low-rank maps and residual connections, shared by all matrices of a shape (eq. 3).

    ``h = z + ReLU(s₁ ⊙ (U₁V₁z + b) + o₁)``, ``g(z) = h + s₂ ⊙ (U₂V₂h + b₂) + o₂`` with a scale ``s`` and a shift ``o``
    for each matrix. It begins as the identity: ``U`` is zero, and so are ``b`` and ``o``.

    Args:
        width: of ``z``, the concatenation of ``u`` and ``δ``.
        rank: of both maps.
        matrices: how many share it.
    """

    def __init__(self, width: int, rank: int, matrices: int) -> None:
        super().__init__()
        rank = min(rank, width)
        self.down = nn.ParameterList(nn.Parameter(torch.randn(rank, width) * width**-0.5) for _ in range(2))
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(width, rank)) for _ in range(2))
        self.bias = nn.ParameterList(nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.scale = nn.ParameterList(nn.Parameter(torch.ones(matrices, width)) for _ in range(2))
        self.shift = nn.ParameterList(nn.Parameter(torch.zeros(matrices, width)) for _ in range(2))

    def forward(self, z: Tensor, matrix: int) -> Tensor:
        """``[..., width]`` for one of the matrices."""
        for i in range(2):
            inner = (z @ self.down[i].t()) @ self.up[i].t() + self.bias[i]
            inner = self.scale[i][matrix] * inner + self.shift[i][matrix]
            # clamp, whose gradient at 0 is 1 where ReLU's is 0: from the identity, ReLU would never move.
            z = z + (inner.clamp(min=0) if i == 0 else inner)
        return z


class MendNetwork(Network):
    """The networks of all edited matrices.

    Args:
        view: the model.
        config: the configuration.
    """

    def __init__(self, view: ModelView, config: MendConfig) -> None:
        super().__init__()
        projections = {layer: view.layers[layer].value_projection for layer in config.edited_layers(view)}
        shapes: dict[tuple[int, int], list[int]] = {}
        for layer, projection in projections.items():
            shapes.setdefault((projection.d_in, projection.d_out), []).append(layer)
        self.place = {layer: (f"{a}x{b}", i) for (a, b), group in shapes.items() for i, layer in enumerate(group)}
        self.shared = nn.ModuleDict(
            {f"{a}x{b}": SharedMLP(a + b, config.rank, len(group)) for (a, b), group in shapes.items()}
        )
        self.inputs = nn.ModuleDict({str(layer): Normaliser(p.d_in) for layer, p in projections.items()})
        self.deltas = nn.ModuleDict({str(layer): Normaliser(p.d_out) for layer, p in projections.items()})
        # The rate is learned as its logarithm, in units in which Adam's step is rate_learning_rate.
        self.unit = config.rate_learning_rate / config.learning_rate
        self.rates = nn.ParameterDict({str(layer): nn.Parameter(torch.zeros(())) for layer in projections})
        self.first = {layer: config.edit_rate * unit_step(p) for layer, p in projections.items()}

    def normalise(self, factors: Factors) -> None:
        """Statistics of both factors over tokens."""
        for layer in factors.inputs:
            for parts, tensors in ((self.inputs, factors.inputs), (self.deltas, factors.deltas)):
                module: Any = parts[str(layer)]
                module.observe(tensors[layer][factors.mask])

    def rate(self, layer: int) -> Tensor:
        """``α``, the learned step of one matrix."""
        return self.first[layer] * (self.unit * self.rates[str(layer)]).exp()

    def edited(self, factors: Factors, layer: int) -> tuple[Tensor, Tensor]:
        """``ũ`` ``[requests, tokens, d_in]`` and ``δ̃`` ``[requests, tokens, d_out]``; zero on padding."""
        u = self.inputs[str(layer)](factors.inputs[layer])
        delta = self.deltas[str(layer)](factors.deltas[layer])
        name, index = self.place[layer]
        out = self.shared[name](torch.cat([u, delta], -1), index) * factors.mask[..., None]
        return out[..., : u.shape[-1]], out[..., u.shape[-1] :]

    def shifts(self, view: ModelView, items: Sequence[Encoded], factors: Factors, together: int) -> Shifts:
        """``-α Σ δ̃ ũᵀ``, summed over the tokens of all requests of a group."""
        made: dict[int, tuple[Tensor, Tensor]] = {}
        for layer in factors.inputs:
            u, delta = self.edited(factors, layer)
            made[layer] = grouped(-self.rate(layer) * delta, u, together)
        return made


class Mend(GradientEditor):
    """MEND."""

    name = "mend"
    Config = MendConfig
    reference = "Mitchell et al., Fast Model Editing at Scale, ICLR 2022, arXiv:2110.11309"

    def network(self, view: ModelView, config: GradientConfig) -> Network:
        """A network that changes nothing about the gradient but its scale."""
        if not isinstance(config, MendConfig):
            raise TypeError(f"expected a MendConfig, got {type(config).__name__}")
        return MendNetwork(view, config)
