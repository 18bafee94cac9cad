"""ROME: one fact, one layer, one rank."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kecore.api.method import MethodContext
from kecore.api.types import Capabilities
from kecore.batch import RequestBatch
from kecore.edit import WeightEdit
from kecore.engine.config import LocateConfig
from kecore.engine.keys import Keys, Prompts
from kecore.engine.solve import one_by_one
from kecore.model import ModelView, SiteId
from kecore.ops import Solution
from kecore_methods import hparams
from kecore_methods.hparams import HparamsTable
from kecore_methods.presets import Published

__all__ = ["Rome"]


class Rome:
    """Rank-One Model Editing, with R-ROME's consistent key unless asked otherwise.

    Several requests are written one after another, each exactly on top of the ones before; their values are
    optimised together on the model as it was.
    """

    class Config(Published, LocateConfig):
        """Configuration of ROME."""

        preset_file: ClassVar[str] = "rome"
        hparams_table: ClassVar[HparamsTable | None] = hparams.ROME

        consistent_key: bool = Field(
            default=True,
            description="Use the key averaged over contexts on both sides of the update (R-ROME, arXiv 2403.07175); "
            "False fits the bare prompt's key, as the original does, and can disable the model.",
        )
        second_moment: bool = Field(
            default=True,
            description="Write against the second moment of natural keys; False takes the identity for it.",
        )

        def statistics_layers(self, view: ModelView) -> tuple[int, ...]:
            """Return the one edited layer, or none where the identity stands in for the second moment."""
            return self.edited_layers(view)[-1:] if self.second_moment else ()

    name = "rome"
    capabilities = Capabilities(kind="weights", batch=False, sequential=True, needs_statistics=True)
    reference = (
        "Meng et al., Locating and Editing Factual Associations in GPT, NeurIPS 2022, arXiv:2202.05262; "
        "Gupta et al., Rebuilding ROME, EMNLP 2024, arXiv:2403.07175"
    )
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> WeightEdit:
        """Plan the edit; see :class:`kecore.engine.closed_form.ClosedForm`."""
        config: Rome.Config = context.config
        layers = config.edited_layers(view)[-1:]
        statistics = context.need_statistics(layers, self.name) if config.second_moment else None
        bare_keys = None if config.consistent_key else self._bare_keys(view, batch, context, layers[0])

        def solve(site: SiteId, keys: Keys, residuals: Tensor) -> Solution:
            factor = statistics.factor(site, config.statistics_ridge) if statistics is not None else None
            fitted = None if bare_keys is None else bare_keys.at(site).mean()
            return one_by_one(keys.mean(), residuals, factor, fitted)

        return config.engine(layers, solve=solve).plan(view, batch, context, self.name)

    @staticmethod
    def _bare_keys(view: ModelView, batch: RequestBatch, context: MethodContext, layer: int) -> Keys:
        """Return the keys of the prompts without a context before them, of ``u`` groups."""
        with view.frozen(), torch.no_grad():
            layer_pass = Prompts(view, batch, ("",), context.memory).begin_pass((layer,))
            keys, _ = layer_pass.advance(layer)
            return keys
