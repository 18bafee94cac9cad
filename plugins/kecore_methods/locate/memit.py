"""MEMIT: many facts at once, spread over several layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from kecore.edit import WeightEdit
from kecore.editing.keys import Keys
from kecore.editing.solve import least_squares
from kecore.method import MethodContext
from kecore.model_view import ModelView
from kecore.ops import Solution
from kecore.types import Capabilities, EditRequest
from kecore_methods.locate.config import BatchConfig

__all__ = ["Memit"]


class Memit:
    """Mass-Editing Memory in a Transformer: least squares against the second moment of natural keys.

    Requests about one subject share a value (MEMIT-Merge); with ``boundary_layers`` only the first and last
    layer are edited (BLUE).
    """

    class Config(BatchConfig):
        """Configuration of MEMIT."""

        preset_key: ClassVar[str] = "memit"

        preservation: float = Field(
            default=0.05,
            ge=0,
            description="Weight of preserved keys, relative to the new keys' own: a lone edit "
            "realises 1 / (1 + preservation) of its residual.",
        )
        preservation_lambda: float | None = Field(
            default=None,
            gt=0,
            description="MEMIT's lambda (mom2_update_weight), instead of the relative weight.",
        )
        merge_subjects: bool = Field(
            default=True,
            description="Requests about one subject share key and value (MEMIT-Merge, arXiv 2502.07322).",
        )
        boundary_layers: bool = Field(
            default=False, description="Edit only the first and last of the layers (BLUE, arXiv 2502.03748)."
        )

    name = "memit"
    capabilities = Capabilities(kind="weights", batch=True, sequential=True, needs_statistics=True)
    reference = "Meng et al., Mass-Editing Memory in a Transformer, ICLR 2023, arXiv:2210.07229"
    api = (1, 1)

    def plan(self, view: ModelView, requests: Sequence[EditRequest], context: MethodContext) -> WeightEdit:
        """Plan the edit; see :class:`kecore.editing.closed_form.ClosedForm`."""
        config: Memit.Config = context.config
        layers = config.edited_layers(view)
        if config.boundary_layers:
            layers = tuple(sorted({layers[0], layers[-1]}))
        statistics = context.need_statistics(layers)
        absolute = config.preservation_lambda is not None

        def solve(layer: int, keys: Keys, residuals: Tensor) -> Solution:
            factor = statistics.factor(layer, config.statistics_ridge)
            weight = config.preservation if config.preservation_lambda is None else config.preservation_lambda
            return least_squares(keys, residuals, factor, weight, absolute=absolute, each=config.each_context)

        engine = config.engine(layers, solve=solve, merge_subjects=config.merge_subjects)
        return engine.plan(view, requests, context, self.name)
