"""EAMET: MEMIT, whose values lie to each other as their keys do, so that one matrix can write them all.

Least squares maps similar keys to similar values whether asked to or not. Where two keys are alike and their values are
not, one of the facts is lost; with thousands of facts there are many such pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from kecore.engine.closed_form import ClosedForm
from kecore.engine.value_steps import Coupling
from kecore_methods.locate.memit import LeastSquares

__all__ = ["Alignment", "Eamet"]


class Alignment(Coupling):
    """The part of a value's loss that compares its cosines with other values to those of their keys.

    Args:
        keys: ``[u, d_in]``, one key a group.
        divergence: factor of ``KL(P_r ‖ P_k)``, where both are softmaxes of a group's cosines with all others, those
            of values and those of keys.
        squares: factor of the mean squared difference of the cosines with the nearest keys.
        temperature: of the softmaxes.
        nearest: number of these keys.
    """

    def __init__(
        self, keys: Tensor, divergence: float = 1.0, squares: float = 1.0, temperature: float = 0.07, nearest: int = 10
    ) -> None:
        unit = normalize(keys.float(), dim=1)
        self.similar = unit @ unit.t()
        self.divergence, self.squares, self.temperature, self.nearest = divergence, squares, temperature, nearest
        self.found: Tensor | None = None

    def loss(self, delta: Tensor, members: Tensor) -> Tensor:
        """Loss of some groups, against each other and all groups kept so far.

        Args:
            delta: ``[b, d_model]``, their values; the others' do not move with them.
            members: ``[b]``, which groups they are.

        Returns:
            ``[b]``; zero for a group without a value or without others.
        """
        every = self._kept(delta).clone()
        every[members] = delta.detach()
        similar = self.similar.to(delta)[members]
        there = every.norm(dim=1) > 0
        others = there[None, :].repeat(len(members), 1)
        others[torch.arange(len(members)), members] = False
        counted = others.any(1) & there[members]
        if not bool(counted.any()):
            return delta.new_zeros(len(members))
        values, keys, others = (
            normalize(delta[counted], dim=1) @ normalize(every, dim=1).t(),
            similar[counted],
            others[counted],
        )
        least = torch.finfo(delta.dtype).min
        given, wanted = ((x / self.temperature).masked_fill(~others, least).log_softmax(1) for x in (values, keys))
        divergence = (given.exp() * (given - wanted)).masked_fill(~others, 0.0).sum(1)
        near = keys.masked_fill(~others, least).topk(min(self.nearest, keys.shape[1]), dim=1).indices
        real = others.gather(1, near).to(delta)
        squares = ((values - keys).square().gather(1, near) * real).sum(1) / real.sum(1)
        loss = self.divergence * divergence + self.squares * squares
        return delta.new_zeros(len(members)).index_put((counted.nonzero().flatten(),), loss)

    def keep(self, delta: Tensor, members: Tensor) -> None:
        """Take the finished values ``[b, d_model]`` of some groups for the ones that come after."""
        self.found = self._kept(delta).index_copy(0, members, delta)

    def _kept(self, like: Tensor) -> Tensor:
        return like.new_zeros(len(self.similar), like.shape[1]) if self.found is None else self.found


class Eamet(LeastSquares):
    """Embedding Alignment Model Editing in Transformers: see :class:`Alignment`."""

    class Config(LeastSquares.Config):
        """Configuration of EAMET; factors and temperature are those of the released Qwen-2.5 set-up."""

        align_divergence: float = Field(
            default=1.0, ge=0, description="Factor of KL(values' cosines | keys' cosines) in the value loss."
        )
        align_squares: float = Field(
            default=1.0, ge=0, description="Factor of the mean squared difference of cosines with the nearest keys."
        )
        align_temperature: float = Field(default=0.07, gt=0, description="Temperature of the cosines' softmaxes.")
        align_nearest: int = Field(default=10, ge=1, description="How many nearest keys count in the squares.")

        def engine(self, layers: tuple[int, ...], **choices: Any) -> ClosedForm:
            """The engine with aligned values."""

            def align(keys: Tensor) -> Alignment:
                return Alignment(
                    keys, self.align_divergence, self.align_squares, self.align_temperature, self.align_nearest
                )

            return super().engine(layers, **{"coupling": align, **choices})

    name = "eamet"
    reference = (
        "Dai et al., EAMET: Robust Massive Model Editing via Embedding Alignment Optimization, ICLR 2026, "
        "arXiv:2505.11876"
    )
