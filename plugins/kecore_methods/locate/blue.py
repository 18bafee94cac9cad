"""BLUE: the boundary layers only, each for values of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from kecore.api.config import StageSettings
from kecore.engine.closed_form import ClosedForm
from kecore.engine.keys import Keys, Prompts
from kecore.engine.spread import Residuals, Spread
from kecore.model import SiteId

__all__ = ["Blue", "Boundary"]


class Boundary(Spread):
    """The first and the last layer are edited, each for values of its own (BLUE, arXiv 2502.03748).

    The last layer's values are optimised with the first layer's update in place. All else is as in the spread within:
    each layer is a part of its own, of which it writes what that spread lets the last layer of a part write.

    Args:
        within: the spread that the method has otherwise.
    """

    def __init__(self, within: Spread) -> None:
        self._within = within

    def parts(self, layers: Sequence[int]) -> Sequence[tuple[int, ...]]:
        """Return the first and the last layer, each by itself."""
        return [(layer,) for layer in sorted({layers[0], layers[-1]})]

    def anchor(self, part: tuple[int, ...]) -> int:
        """Return the layer; see the base."""
        return self._within.anchor(part)

    def residuals(self, prompts: Prompts, part: tuple[int, ...], delta: Tensor) -> Residuals:
        """Begin to read the layer; see the base."""
        return self._within.residuals(prompts, part, delta)

    def share(self, site: SiteId, keys: Keys, missing: Tensor, remaining: int) -> Tensor:
        """Return what the layer writes; see the base."""
        return self._within.share(site, keys, missing, remaining)


class Blue:
    """Edit the first and last of the layers only, each for values of its own."""

    name = "blue"
    Settings = StageSettings
    reference = (
        "Li et al., Rethinking Residual Distribution in Locate-then-Edit Model Editing, NeurIPS 2025, arXiv:2502.03748"
    )
    api = (1, 1)

    def apply(self, form: ClosedForm, settings: StageSettings) -> ClosedForm:
        """Return the form with this stage in it."""
        return replace(form, spread=Boundary(form.spread))
