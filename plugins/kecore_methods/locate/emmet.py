"""EMMET: a batch of facts in one layer, written exactly."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from kecore.api.method import MethodContext
from kecore.api.types import Capabilities
from kecore.batch import RequestBatch
from kecore.edit import WeightEdit
from kecore.engine.config import BatchConfig
from kecore.engine.keys import Keys
from kecore.engine.solve import least_squares
from kecore.model import ModelView, SiteId
from kecore.ops import Solution
from kecore_methods import hparams
from kecore_methods.hparams import HparamsTable
from kecore_methods.presets import Published

__all__ = ["Emmet"]


class Emmet:
    """Equality-constrained Mass Model Editing: ROME's constraint for a whole batch (eq. 9 of the paper).

    One layer is edited, as in the authors' set-ups; where ``layers`` names several, the residual is spread over them as
    MEMIT's is, which their code does too.
    """

    class Config(Published, BatchConfig):
        """Configuration of EMMET."""

        preset_file: ClassVar[str] = "emmet"
        hparams_table: ClassVar[HparamsTable | None] = hparams.EMMET

        ridge: float = Field(
            default=1e-3,
            ge=0,
            description="Softens the equality constraint, relative to the new keys' own weight; 0 is exact.",
        )
        ridge_lambda: float | None = Field(
            default=None,
            ge=0,
            description="The same as an absolute number, instead of the relative one; without effect on a single fact, "
            "as in the authors' code.",
        )

        def edited_layers(self, view: ModelView) -> tuple[int, ...]:
            """Return the layers that were asked for; by depth one layer alone, the last."""
            layers = super().edited_layers(view)
            return layers if self.layers is not None else layers[-1:]

    name = "emmet"
    capabilities = Capabilities(kind="weights", batch=True, sequential=True, needs_statistics=True)
    reference = "Gupta et al., A Unified Framework for Model Editing, EMNLP Findings 2024, arXiv:2403.14236"
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> WeightEdit:
        """Plan the edit; see :class:`kecore.engine.closed_form.ClosedForm`."""
        config: Emmet.Config = context.config
        layers = config.edited_layers(view)
        statistics = context.need_statistics(layers, self.name)
        absolute = config.ridge_lambda is not None
        weight = config.ridge if config.ridge_lambda is None else config.ridge_lambda
        if absolute and len(config.grouped(layers, batch).subjects) == 1:
            weight = 0.0

        def solve(site: SiteId, keys: Keys, residuals: Tensor) -> Solution:
            factor = statistics.factor(site, config.statistics_ridge)
            return least_squares(keys, residuals, factor, weight, absolute=absolute, each=config.each_context)

        return config.engine(layers, solve=solve).plan(view, batch, context, self.name)
