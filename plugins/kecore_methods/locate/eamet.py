"""EAMET: MEMIT, whose values lie to each other as their keys do."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from kecore.engine.closed_form import ClosedForm
from kecore_methods.locate.align import Alignment
from kecore_methods.locate.memit import LeastSquares

__all__ = ["Eamet"]


class Eamet(LeastSquares):
    """Embedding Alignment Model Editing in Transformers: see :class:`kecore_methods.locate.align.Alignment`."""

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

        def engine(self, layers: tuple[int, ...], **stages: Any) -> ClosedForm:
            """The engine with aligned values."""

            def align(keys: Tensor) -> Alignment:
                return Alignment(
                    keys, self.align_divergence, self.align_squares, self.align_temperature, self.align_nearest
                )

            return super().engine(layers, **{"align": align, **stages})

    name = "eamet"
    reference = (
        "Dai et al., EAMET: Robust Massive Model Editing via Embedding Alignment Optimization, ICLR 2026, "
        "arXiv:2505.11876"
    )
