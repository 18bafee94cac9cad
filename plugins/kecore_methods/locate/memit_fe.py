"""MEMIT-FE: values of the first edited layer, whose effect on the later ones is what those have to write."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kecore.engine.closed_form import ClosedForm
from kecore.engine.needs import Shape
from kecore.model import ModelView
from kecore_methods.locate.memit import LeastSquares

__all__ = ["MemitFE"]


class MemitFE(LeastSquares):
    """MEMIT with forward replay in place of the backward spread: see :class:`kecore.engine.target.ForwardReplay`."""

    class Config(LeastSquares.Config):
        """Configuration of MEMIT-FE."""

        def memory_shape(self, view: ModelView) -> Shape:
            """What of this configuration decides memory."""
            shape = super().memory_shape(view)
            return replace(shape, anchor=min(shape.layers))

        def engine(self, layers: tuple[int, ...], **stages: Any) -> ClosedForm:
            """The engine with targets from the first layer."""
            return super().engine(layers, **{"forward": True, **stages})

    name = "memit-fe"
    reference = (
        "Liu et al., From Backward Spreading to Forward Replay: Revisiting Target Construction in LLM Parameter "
        "Editing, ICML 2026, arXiv:2605.00358"
    )
