"""MEMIT: many facts at once, spread over several layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from kecore.api.method import MethodContext
from kecore.api.types import Capabilities
from kecore.batch import RequestBatch
from kecore.edit import WeightEdit
from kecore.engine.accumulate import Past
from kecore.engine.config import BatchConfig
from kecore.engine.keys import Keys
from kecore.engine.solve import least_squares
from kecore.model import ModelView, SiteId
from kecore.ops import Solution
from kecore.statistics import KeyStatistics
from kecore_methods import hparams
from kecore_methods.hparams import HparamsTable
from kecore_methods.presets import Published

__all__ = ["LeastSquares", "Memit", "PreservedConfig"]


class PreservedConfig(Published, BatchConfig):
    """Configuration of methods that weigh new keys against the second moment of natural ones."""

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
    norm_weight: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the update's own norm beside the preserved keys, relative to their mean square "
        "(ENCORE's constraint, arXiv 2502.01636).",
    )
    norm_lambda: float | None = Field(
        default=None, gt=0, description="The same as ENCORE's absolute lambda_n; needs preservation_lambda."
    )

    @model_validator(mode="after")
    def _norm_is_relative_to_a_lambda(self) -> Self:
        if self.norm_lambda is not None and self.preservation_lambda is None:
            raise ValueError("'norm_lambda' counts beside 'preservation_lambda'; give both, or use 'norm_weight'")
        return self

    def norm(self, statistics: KeyStatistics, site: SiteId) -> float:
        """Return the weight of ``‖Δ‖²`` in units of the preserved keys' mean square at a site."""
        if self.norm_lambda is None or self.preservation_lambda is None:
            return self.norm_weight
        return self.norm_lambda / (self.preservation_lambda * statistics.mean_square(site))


class LeastSquares:
    """MEMIT's solve; the methods that add stages to it differ in name, paper and configuration only."""

    class Config(PreservedConfig):
        """Configuration that MEMIT shares with its relatives."""

        accumulate: bool = Field(
            default=False,
            description="Keep what the keys of this session's earlier edits are mapped to, so that edits one after "
            "another give what one edit of all would (arXiv 2605.26670).",
        )

    name: ClassVar[str]
    capabilities = Capabilities(kind="weights", batch=True, sequential=True, needs_statistics=True)
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> WeightEdit:
        """Plan the edit; see :class:`kecore.engine.closed_form.ClosedForm`."""
        config: LeastSquares.Config = context.config
        layers = config.edited_layers(view)
        statistics = context.need_statistics(layers, self.name)
        absolute = config.preservation_lambda is not None
        weight = config.preservation if config.preservation_lambda is None else config.preservation_lambda
        subjects = config.grouped(layers, batch).subjects

        def solve(site: SiteId, keys: Keys, residuals: Tensor) -> Solution:
            factor = statistics.factor(site, config.statistics_ridge + config.norm(statistics, site))
            residuals = self.missing(site, keys, residuals, context.state)
            past = Past(context.state, site, subjects) if config.accumulate else None
            return least_squares(
                keys, residuals, factor, weight, absolute=absolute, each=config.each_context, past=past
            )

        return config.engine(layers, solve=solve).plan(view, batch, context, self.name)

    def missing(self, site: SiteId, keys: Keys, residuals: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Return what a site is to write, ``[d_out, u]``: the residuals as they are, unless a method knows more."""
        return residuals


class Memit(LeastSquares):
    """Mass-Editing Memory in a Transformer: least squares against the second moment of natural keys.

    Requests about one subject share a value (MEMIT-Merge).
    """

    class Config(LeastSquares.Config):
        """Configuration of MEMIT."""

        preset_file: ClassVar[str] = "memit"
        hparams_table: ClassVar[HparamsTable | None] = hparams.MEMIT

    name = "memit"
    reference = "Meng et al., Mass-Editing Memory in a Transformer, ICLR 2023, arXiv:2210.07229"
