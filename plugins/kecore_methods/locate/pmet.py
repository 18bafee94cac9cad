"""PMET: values that leave to attention what is attention's, and a square-root spread."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field

from kecore.engine.closed_form import ClosedForm, by_square_root
from kecore.engine.values import ValueSettings
from kecore_methods.locate.memit import LeastSquares

__all__ = ["Pmet"]


class Pmet(LeastSquares):
    """Precise Model Editing in a Transformer.

    What the attention and the feed-forward block add at the subject is optimised together; only the latter is written,
    against the feed-forward block's own output.
    """

    class Config(LeastSquares.Config):
        """Configuration of PMET; lengths are relative to the norms of the two blocks' outputs."""

        preset_key: ClassVar[str] = "pmet"

        # Of two vectors one is forgotten, so the other has to be learnt well: MEMIT's 20 steps write fewer targets.
        steps: int = Field(default=25, ge=1, description="Evaluations of the value loss (Adam makes one update fewer).")

        def value_settings(self) -> ValueSettings:
            """Numbers of the target stage."""
            return replace(super().value_settings(), mixer=True)

        def engine(self, layers: tuple[int, ...], **stages: Any) -> ClosedForm:
            """The engine with PMET's spread and targets."""
            return super().engine(layers, **{"spread": by_square_root, "projection": True, **stages})

    name = "pmet"
    reference = "Li et al., PMET: Precise Model Editing in a Transformer, AAAI 2024, arXiv:2308.08742"
