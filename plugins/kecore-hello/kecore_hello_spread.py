"""A method with a spread of its own: the later a layer, the more it writes.

MEMIT lets every layer still to come write an equal share of what is missing, so that all of them write about the same.
Here a layer writes ``1 / remaining ** power`` of it: with a power of 1 that is MEMIT's spread, with more of it the
layers that are far from the one the value was optimised for are left nearly alone.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from kecore.api.method import MethodContext
from kecore.api.types import Capabilities
from kecore.batch import RequestBatch
from kecore.edit import Edit
from kecore.engine import ClosedForm, Keys, LocateConfig, Spread, least_squares
from kecore.model import ModelView, SiteId
from kecore.ops import Solution


class ByPower(Spread):
    """Each layer writes a share of what is missing that grows towards the last one, which writes all that is left."""

    def __init__(self, power: float) -> None:
        self.power = power

    def share(self, site: SiteId, keys: Keys, missing: Tensor, remaining: int) -> Tensor:
        """Return ``missing / remaining ** power``."""
        return missing / remaining**self.power


class HelloSpreadConfig(LocateConfig):
    """What may be chosen beside what every locate-then-edit method has."""

    power: float = Field(default=2.0, ge=1, description="How much more the later layers write; 1 is MEMIT's spread.")

    def engine(self, layers: tuple[int, ...], **choices: Any) -> ClosedForm:
        """Return the engine with this method's spread."""
        return super().engine(layers, **{"spread": ByPower(self.power), **choices})


class HelloSpread:
    """Write facts into several layers as smallest changes, spread by a power."""

    name = "hello-spread"
    Config = HelloSpreadConfig
    capabilities = Capabilities("weights", batch=True, sequential=True)
    reference = "kecore, write your own stage (docs/write-a-stage.md); after Meng et al., arXiv:2210.07229"
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> Edit:
        """Work out the edit; the model is as before when this returns."""
        config: HelloSpreadConfig = context.config

        def smallest_change(site: SiteId, keys: Keys, residuals: Tensor) -> Solution:
            return least_squares(keys, residuals, factor=None, weight=0.05)

        form = config.engine(config.edited_layers(view), solve=smallest_change)
        return form.plan(view, batch, context, self.name)
