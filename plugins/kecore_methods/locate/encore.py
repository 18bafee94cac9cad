"""ENCORE: MEMIT with values that are long enough and no longer, and updates that cost something by themselves."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from kecore_methods import hparams
from kecore_methods.hparams import HparamsTable
from kecore_methods.locate.memit import LeastSquares

__all__ = ["Encore"]


class Encore(LeastSquares):
    """Early stopping and Norm-Constrained Robust knowledge Editing.

    A value is finished once its target is the most probable answer in all contexts, and least squares weighs the
    update's own norm: ``min λ_p‖ΔL‖² + ‖ΔK_past‖² + ‖ΔK - R‖² + λ_n‖Δ‖²``.
    """

    class Config(LeastSquares.Config):
        """Configuration of ENCORE."""

        preset_file: ClassVar[str] = "encore"
        hparams_table: ClassVar[HparamsTable | None] = hparams.ENCORE

        stop_most_probable: bool = Field(default=True, description="The early stop; see MEMIT's.")
        norm_weight: float = Field(
            default=0.07,
            ge=0,
            description="The norm constraint; see MEMIT's. The released lambda_n / lambda_p is 20 / 15000, a 15th of "
            "AlphaEdit's threshold on the same statistics, which is 1 in these units.",
        )
        accumulate: bool = Field(default=True, description="Keep earlier edits' keys, as released; see MEMIT's.")

    name = "encore"
    reference = (
        "Gupta et al., Lifelong Knowledge Editing requires Better Regularization, EMNLP Findings 2025, arXiv:2502.01636"
    )
