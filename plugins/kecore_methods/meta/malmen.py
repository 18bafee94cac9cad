"""MALMEN: the shifts of many edits are brought together by least squares instead of being summed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kecore.model import ModelView
from kecore.text import Encoded
from kecore.training import Schedule
from kecore_methods import hparams
from kecore_methods.hparams import HparamsTable
from kecore_methods.meta.factors import Factors, Shifts, group_requests
from kecore_methods.meta.learner import GradientConfig, GradientEditor, Network
from kecore_methods.meta.mend import MendConfig, MendNetwork

__all__ = ["Malmen", "MalmenConfig"]


class MalmenConfig(MendConfig):
    """MEND's network, and the regularisation of the normal equation."""

    hparams_table: ClassVar[HparamsTable | None] = hparams.MALMEN

    together: int = Field(
        default=4, ge=1, description="Requests of one edit while it is trained; an edit may have any number of them."
    )
    preservation: float = Field(
        default=1.0, gt=0, description="First λ, relative to the mean square of a key's norm; learned from there."
    )


class MalmenNetwork(MendNetwork):
    """MEND's networks with a learned λ for each matrix.

    Args:
        view: the model.
        config: the configuration.
    """

    def __init__(self, view: ModelView, config: MalmenConfig) -> None:
        super().__init__(view, config)
        self.relative = config.preservation
        self.lambdas = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in self.rates})
        # A buffer, so that the unit of λ travels with the trained network.
        for name in self.rates:
            self.register_buffer(f"square_{name}", torch.ones(()))

    def normalise(self, factors: Factors) -> None:
        """Take MEND's statistics, and the mean squared norm of the keys of each matrix."""
        super().normalise(factors)
        for layer, u in factors.inputs.items():
            square: Any = getattr(self, f"square_{layer}")
            square.copy_(u[factors.mask].square().sum(-1).mean())

    def used_tokens(self, factors: Factors, layer: int) -> Tensor:
        """Return all tokens: MALMEN's released code leaves none out."""
        del layer
        return factors.mask

    def preservation(self, layer: int) -> Tensor:
        """Return ``λ`` of one matrix."""
        square: Any = getattr(self, f"square_{layer}")
        return self.relative * square * (self.unit * self.lambdas[str(layer)]).exp()

    def shifts(self, view: ModelView, items: Sequence[Encoded], factors: Factors, together: int) -> Shifts:
        """Return ``D Uᵀ (U Uᵀ + λI)⁻¹`` over the tokens of all requests of a group (section 3.2).

        ``U`` holds the keys, and a column of ``D`` the change of value that the shift of its own token makes at its own
        key, ``d = -α δ̃ (ũᵀ u)``. Solved as ``D (UᵀU + λI)⁻¹ Uᵀ``, which is the same and as large as there are tokens.
        """
        shifts: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, keys in factors.inputs.items():
            u, delta = self.edited(factors, layer)
            change = -self.rate(layer) * delta * (u * keys).sum(-1, keepdim=True)  # [requests, tokens, d_out]
            change, keys = group_requests(change, keys, together)
            # Padding has zero keys and changes: its rows of the system are λI, and it stays out of the solution.
            gram = keys @ keys.transpose(1, 2)  # [groups, tokens, tokens]
            eye = torch.eye(gram.shape[-1], device=gram.device)
            shifts[layer] = torch.linalg.solve(gram + self.preservation(layer) * eye, change), keys
        return shifts


class Malmen(GradientEditor):
    """MALMEN."""

    name = "malmen"
    Config = MalmenConfig
    reference = "Tan et al., Massive Editing for Large Language Models via Meta Learning, ICLR 2024, arXiv:2311.04661"
    schedule = Schedule(steps=400, batch_size=8)

    def network(self, view: ModelView, config: GradientConfig) -> Network:
        """Return a network that changes nothing about the gradient but its scale."""
        if not isinstance(config, MalmenConfig):
            raise TypeError(f"expected a MalmenConfig, got {type(config).__name__}")
        return MalmenNetwork(view, config)
