"""MEND: a small network maps the factors of a fine-tuning gradient to those of an edit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kecore.engine.normaliser import Normaliser
from kecore.model import ModelView
from kecore.text import Encoded
from kecore_methods import hparams
from kecore_methods.hparams import HparamsTable
from kecore_methods.meta.factors import Factors, Shifts, group_requests, unit_step
from kecore_methods.meta.learner import GradientConfig, GradientEditor, Network
from kecore_methods.presets import Published

__all__ = ["Mend", "MendConfig", "SharedMLP"]


class MendConfig(Published, GradientConfig):
    """Configuration; the paper's numbers where they do not depend on the model's size."""

    hparams_table: ClassVar[HparamsTable | None] = hparams.MEND

    rank: int = Field(default=128, ge=1, description="Rank of the network's two maps (1920 in the paper).")
    edit_rate: float = Field(
        default=0.05,
        gt=0,
        description="First step of an edit: size of one token's update beside what the matrix does to a key.",
    )
    rate_learning_rate: float = Field(default=0.1, gt=0, description="Of Adam, for the logarithm of that step.")


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
        # One entry for each of the two maps.
        self.down, self.up, self.bias = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        self.scale, self.shift = nn.ParameterList(), nn.ParameterList()
        for _ in range(2):
            self.down.append(nn.Parameter(torch.randn(rank, width) * width**-0.5))
            self.up.append(nn.Parameter(torch.zeros(width, rank)))
            self.bias.append(nn.Parameter(torch.zeros(width)))
            self.scale.append(nn.Parameter(torch.ones(matrices, width)))
            self.shift.append(nn.Parameter(torch.zeros(matrices, width)))

    def forward(self, z: Tensor, matrix: int) -> Tensor:
        """Return ``[..., width]`` for one of the matrices."""
        # clamp, whose gradient at 0 is 1 where ReLU's is 0: from the identity, ReLU would never move.
        hidden = z + self._residual(0, z, matrix).clamp(min=0)
        return hidden + self._residual(1, hidden, matrix)

    def _residual(self, index: int, z: Tensor, matrix: int) -> Tensor:
        """Return ``s ⊙ (U V z + b) + o`` of the first or the second map."""
        inner = (z @ self.down[index].t()) @ self.up[index].t() + self.bias[index]
        return self.scale[index][matrix] * inner + self.shift[index][matrix]


class MendNetwork(Network):
    """The networks of all edited matrices.

    Args:
        view: the model.
        config: the configuration.
    """

    def __init__(self, view: ModelView, config: MendConfig) -> None:
        super().__init__()
        projections = {layer: view.layers[layer].site.linear for layer in config.edited_layers(view)}
        shapes: dict[tuple[int, int], list[int]] = {}
        for layer, projection in projections.items():
            shapes.setdefault((projection.d_in, projection.d_out), []).append(layer)
        # Matrices of one shape share an MLP, in which each has its index.
        self.shared = nn.ModuleDict()
        self.mlp_name: dict[int, str] = {}
        self.mlp_index: dict[int, int] = {}
        for (d_in, d_out), layers in shapes.items():
            name = f"{d_in}x{d_out}"
            self.shared[name] = SharedMLP(d_in + d_out, config.rank, len(layers))
            for index, layer in enumerate(layers):
                self.mlp_name[layer], self.mlp_index[layer] = name, index
        self.inputs = nn.ModuleDict({str(layer): Normaliser(p.d_in) for layer, p in projections.items()})
        self.deltas = nn.ModuleDict({str(layer): Normaliser(p.d_out) for layer, p in projections.items()})
        # The rate is learned as its logarithm, in units in which Adam's step is rate_learning_rate.
        self.unit = config.rate_learning_rate / config.learning_rate
        self.rates = nn.ParameterDict({str(layer): nn.Parameter(torch.zeros(())) for layer in projections})
        self.first = {layer: config.edit_rate * unit_step(p) for layer, p in projections.items()}

    def normalise(self, factors: Factors) -> None:
        """Take the statistics of both factors over tokens."""
        for layer in factors.inputs:
            used = self.used_tokens(factors, layer)
            inputs: Any = self.inputs[str(layer)]
            inputs.observe(factors.inputs[layer][used])  # [used tokens, d_in]
            deltas: Any = self.deltas[str(layer)]
            deltas.observe(factors.deltas[layer][used])  # [used tokens, d_out]

    def used_tokens(self, factors: Factors, layer: int) -> Tensor:
        """Return which tokens count at a layer, ``[requests, tokens]``: those with a gradient, as in the released code.

        A normalised zero is no zero, so a token without a gradient would take part in the update, and most have none.
        """
        return factors.with_gradient(layer)

    def rate(self, layer: int) -> Tensor:
        """Return ``α``, the learned step of one matrix."""
        return self.first[layer] * (self.unit * self.rates[str(layer)]).exp()

    def edited(self, factors: Factors, layer: int) -> tuple[Tensor, Tensor]:
        """Return ``ũ`` ``[requests, tokens, d_in]`` and ``δ̃`` ``[requests, tokens, d_out]``; zero elsewhere."""
        u = self.inputs[str(layer)](factors.inputs[layer])
        delta = self.deltas[str(layer)](factors.deltas[layer])
        mlp = self.shared[self.mlp_name[layer]]
        out = mlp(torch.cat([u, delta], -1), self.mlp_index[layer]) * self.used_tokens(factors, layer)[..., None]
        return out[..., : u.shape[-1]], out[..., u.shape[-1] :]

    def shifts(self, view: ModelView, items: Sequence[Encoded], factors: Factors, together: int) -> Shifts:
        """Return ``-α Σ δ̃ ũᵀ``, summed over the tokens of all requests of a group."""
        shifts: dict[int, tuple[Tensor, Tensor]] = {}
        for layer in factors.inputs:
            u, delta = self.edited(factors, layer)
            shifts[layer] = group_requests(-self.rate(layer) * delta, u, together)
        return shifts


class Mend(GradientEditor):
    """MEND."""

    name = "mend"
    Config = MendConfig
    reference = "Mitchell et al., Fast Model Editing at Scale, ICLR 2022, arXiv:2110.11309"

    def network(self, view: ModelView, config: GradientConfig) -> Network:
        """Return a network that changes nothing about the gradient but its scale."""
        if not isinstance(config, MendConfig):
            raise TypeError(f"expected a MendConfig, got {type(config).__name__}")
        return MendNetwork(view, config)
