"""EAMET: MEMIT, whose values are as similar to each other as their keys are, so that one matrix can write them all.

Least squares maps similar keys to similar values whether that is wanted or not. Where two keys are alike and their
values are not, one of the facts is lost; with thousands of facts there are many such pairs.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from kecore.engine.closed_form import ClosedForm
from kecore.engine.value_steps import Coupling
from kecore_methods import hparams
from kecore_methods.hparams import HparamsTable
from kecore_methods.locate.memit import LeastSquares

__all__ = ["Alignment", "Eamet"]


class Alignment(Coupling):
    """A term of the values' loss that compares their cosines with each other to those of their keys.

    Args:
        keys: ``[u, d_in]``, one key a group.
        divergence: factor of ``KL(P_v ‖ P_k)``, where ``P_v`` is the softmax of the cosines of a group's value with all
            others, and ``P_k`` that of its key.
        squares: factor of the mean squared difference of the cosines with the nearest keys.
        temperature: of the softmaxes.
        nearest: number of these keys.
        released: take ``KL(P_k ‖ P_v)``, and weigh the squares by the softmax of the nearest keys' cosines, as the
            released code does.
    """

    def __init__(
        self,
        keys: Tensor,
        divergence: float = 1.0,
        squares: float = 1.0,
        temperature: float = 0.07,
        nearest: int = 10,
        *,
        released: bool = False,
    ) -> None:
        self.released = released
        unit = normalize(keys.float(), dim=1)
        self.key_cosines = unit @ unit.t()  # [u, u]
        self.divergence, self.squares, self.temperature, self.nearest = divergence, squares, temperature, nearest
        self.finished: Tensor | None = None

    def loss(self, delta: Tensor, members: Tensor) -> Tensor:
        """Return the loss of some groups, against each other and all groups whose values are finished.

        Args:
            delta: ``[b, d_model]``, their values; the other groups' do not move with them.
            members: ``[b]``, which groups they are.

        Returns:
            ``[b]``; zero for a group that has no value, or no other group to be compared with.
        """
        values = self._finished(delta).clone()  # [u, d_model]
        values[members] = delta.detach()
        has_value = values.norm(dim=1) > 0  # [u]
        compared = has_value[None, :].repeat(len(members), 1)  # [b, u], the groups that each is compared with
        compared[torch.arange(len(members)), members] = False
        counts = compared.any(1) & has_value[members]  # [b]
        if not bool(counts.any()):
            return delta.new_zeros(len(members))
        compared = compared[counts]  # [n, u] from here on
        key_cosines = self.key_cosines.to(delta)[members][counts]
        value_cosines = normalize(delta[counts], dim=1) @ normalize(values, dim=1).t()
        divergence = self._softmax_divergence(value_cosines, key_cosines, compared)
        squares = self._nearest_squares(value_cosines, key_cosines, compared)
        loss = self.divergence * divergence + self.squares * squares
        return delta.new_zeros(len(members)).index_put((counts.nonzero().flatten(),), loss)

    def _softmax_divergence(self, value_cosines: Tensor, key_cosines: Tensor, compared: Tensor) -> Tensor:
        """Return ``KL(P_v ‖ P_k)``, released ``KL(P_k ‖ P_v)``, over the compared groups, ``[n]`` of ``[n, u]``."""
        lowest = torch.finfo(value_cosines.dtype).min
        log_values = (value_cosines / self.temperature).masked_fill(~compared, lowest).log_softmax(1)
        log_keys = (key_cosines / self.temperature).masked_fill(~compared, lowest).log_softmax(1)
        first, second = (log_keys, log_values) if self.released else (log_values, log_keys)
        return (first.exp() * (first - second)).masked_fill(~compared, 0.0).sum(1)

    def _nearest_squares(self, value_cosines: Tensor, key_cosines: Tensor, compared: Tensor) -> Tensor:
        """Return the mean squared difference of cosines over the compared groups with the nearest keys, ``[n]``."""
        lowest = torch.finfo(value_cosines.dtype).min
        count = min(self.nearest, key_cosines.shape[1])
        nearest_cosines, nearest = key_cosines.masked_fill(~compared, lowest).topk(count, dim=1)  # [n, count] each
        weight = compared.gather(1, nearest).to(value_cosines)  # 0 where there are fewer groups than count
        if self.released:
            weight = weight * (nearest_cosines / self.temperature).softmax(1)
        return ((value_cosines - key_cosines).square().gather(1, nearest) * weight).sum(1) / weight.sum(1)

    def keep(self, delta: Tensor, members: Tensor) -> None:
        """Take the finished values ``[b, d_model]`` of some groups, for the groups that come after."""
        self.finished = self._finished(delta).index_copy(0, members, delta)

    def _finished(self, like: Tensor) -> Tensor:
        """Return the finished values ``[u, d_model]``, zero where a group has none yet."""
        if self.finished is None:
            return like.new_zeros(len(self.key_cosines), like.shape[1])
        return self.finished


class Eamet(LeastSquares):
    """Embedding Alignment Model Editing in Transformers: see :class:`Alignment`."""

    class Config(LeastSquares.Config):
        """Configuration of EAMET; factors and temperature are those of the released Qwen-2.5 set-up."""

        preset_file: ClassVar[str] = "eamet"
        hparams_table: ClassVar[HparamsTable | None] = hparams.EAMET
        align_divergence: float = Field(
            default=1.0, ge=0, description="Factor of KL(values' cosines | keys' cosines) in the value loss."
        )
        align_squares: float = Field(
            default=1.0, ge=0, description="Factor of the mean squared difference of cosines with the nearest keys."
        )
        align_temperature: float = Field(default=0.07, gt=0, description="Temperature of the cosines' softmaxes.")
        align_nearest: int = Field(default=10, ge=1, description="How many nearest keys count in the squares.")
        align_form: Literal["paper", "released"] = Field(
            default="paper",
            description="The divergence of values from keys and the plain mean of squares, or as in the released code "
            "that of keys from values, and squares weighted by how near a key is.",
        )

        def engine(self, layers: tuple[int, ...], **choices: Any) -> ClosedForm:
            """Return the engine with aligned values."""

            def align(keys: Tensor) -> Alignment:
                return Alignment(
                    keys,
                    self.align_divergence,
                    self.align_squares,
                    self.align_temperature,
                    self.align_nearest,
                    released=self.align_form == "released",
                )

            return super().engine(layers, **{"coupling": align, **choices})

    name = "eamet"
    reference = (
        "Dai et al., EAMET: Robust Massive Model Editing via Embedding Alignment Optimization, ICLR 2026, "
        "arXiv:2505.11876"
    )
