"""PMET: values that leave to attention what is attention's, and a square-root spread."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from kecore.engine.closed_form import ClosedForm
from kecore.engine.keys import Keys, Prompts
from kecore.engine.spread import AnchorResiduals, Residuals, Spread
from kecore.engine.value_steps import ValueSettings
from kecore.model import SiteId
from kecore.model.mixer import mixer
from kecore_methods import hparams
from kecore_methods.hparams import HparamsTable
from kecore_methods.locate.memit import LeastSquares

__all__ = ["BySquareRoot", "Pmet"]


class BySquareRoot(Spread):
    """PMET's spread (arXiv 2308.08742): earlier layers take more than an equal share of what is left.

    PMET's values are of the feed-forward block alone, so what is missing is measured at the last layer's value
    projection, and not at its output, where the layers below also have a part.
    """

    def residuals(self, prompts: Prompts, part: tuple[int, ...], delta: Tensor) -> Residuals:
        """Begin to read the layers of a part; see the base."""
        return AnchorResiduals(prompts.view, prompts.begin_pass(part, projection=True), delta)

    def share(self, site: SiteId, keys: Keys, missing: Tensor, remaining: int) -> Tensor:
        """Return ``missing / sqrt(remaining)``."""
        return missing / math.sqrt(remaining)


class Pmet(LeastSquares):
    """Precise Model Editing in a Transformer.

    What the attention and the feed-forward block add at the subject is optimised together; only the latter is written,
    against the feed-forward block's own output.
    """

    class Config(LeastSquares.Config):
        """Configuration of PMET; lengths are relative to the norms of the two blocks' outputs."""

        preset_file: ClassVar[str] = "pmet"
        hparams_table: ClassVar[HparamsTable | None] = hparams.PMET

        # Of two vectors one is forgotten, so the other has to be learnt well: MEMIT's 20 steps write fewer targets.
        steps: int = Field(default=25, ge=1, description="Evaluations of the value loss (Adam makes one update fewer).")

        def value_settings(self) -> ValueSettings:
            """Return the numbers of the target stage."""
            return replace(super().value_settings(), beside=mixer)

        def engine(self, layers: tuple[int, ...], **choices: Any) -> ClosedForm:
            """Return the engine with PMET's spread and targets."""
            return super().engine(layers, **{"spread": BySquareRoot(), **choices})

    name = "pmet"
    reference = "Li et al., PMET: Precise Model Editing in a Transformer, AAAI 2024, arXiv:2308.08742"
