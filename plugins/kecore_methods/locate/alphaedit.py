"""AlphaEdit: updates that live where preserved knowledge has no keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from kecore.edit import WeightEdit
from kecore.editing.accumulate import append, gathered
from kecore.editing.keys import Keys
from kecore.editing.needs import Shape
from kecore.editing.solve import NullSpace
from kecore.method import MethodContext
from kecore.model_view import ModelView
from kecore.ops import Solution, kv_solve
from kecore.types import Capabilities, EditRequest
from kecore_methods.locate.config import BatchConfig

__all__ = ["AlphaEdit"]


class AlphaEdit:
    """Null-space constrained editing; keys of earlier edits are kept and stay where they were mapped."""

    class Config(BatchConfig):
        """Configuration of AlphaEdit."""

        preset_key: ClassVar[str] = "alphaedit"

        relative_threshold: float = Field(
            default=1.0,
            gt=0,
            description="A direction belongs to preserved keys if its eigenvalue exceeds this times the mean.",
        )
        eigenvalue_threshold: float | None = Field(
            default=None,
            gt=0,
            description="The same as an absolute eigenvalue (2e-2 in the paper's code for Llama-3).",
        )
        l2: float = Field(
            default=0.1,
            gt=0,
            description="Length penalty, relative to the mean squared norm of projected keys.",
        )
        l2_lambda: float | None = Field(
            default=None, gt=0, description="The same as an absolute number (10 in the paper's code)."
        )

        def memory_shape(self, view: ModelView) -> Shape:
            """What of this configuration decides memory."""
            return replace(super().memory_shape(view), derived="spectrum")

    name = "alphaedit"
    capabilities = Capabilities(kind="weights", batch=True, sequential=True, needs_statistics=True)
    reference = (
        "Fang et al., AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models, ICLR 2025, "
        "arXiv:2410.02355"
    )
    api = (1, 1)

    def plan(self, view: ModelView, requests: Sequence[EditRequest], context: MethodContext) -> WeightEdit:
        """Plan the edit; keys of all edits so far travel in ``context.state``."""
        config: AlphaEdit.Config = context.config
        layers = config.edited_layers(view)
        statistics = context.need_statistics(layers)
        absolute = config.eigenvalue_threshold is not None
        threshold = config.relative_threshold if config.eigenvalue_threshold is None else config.eigenvalue_threshold

        def solve(layer: int, keys: Keys, residuals: Tensor) -> Solution:
            name = f"keys/{layer}"
            columns, shares = keys.each() if config.each_context else (keys.mean(), None)
            projected = NullSpace(statistics, layer, threshold, absolute=absolute).project(columns)
            size = float(projected.double().square().sum()) / residuals.shape[1]
            ridge = config.l2 * size if config.l2_lambda is None else config.l2_lambda
            append(context.state, name, projected)
            return kv_solve(gathered(context.state, name), residuals, ridge, shares=shares)

        return config.engine(layers, solve=solve).plan(view, requests, context, self.name)
