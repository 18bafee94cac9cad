"""The smallest editing method that works: one layer, no statistics, no sampled contexts.

The feed-forward block of one layer is read as a memory that maps keys to values. For each request, the
value that makes the model say the target is optimised; then the smallest change of the layer's matrix that
maps the subject's key to it is written. That is ROME (arXiv 2202.05262, eq. 2) with ``C = I``: fast, and
ruder to its neighbours than ROME, since nothing tells it which keys other facts use.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from kecore.api.config import MethodConfig
from kecore.api.method import MethodContext
from kecore.api.types import Capabilities
from kecore.batch import RequestBatch
from kecore.edit import Edit
from kecore.engine.closed_form import ClosedForm
from kecore.engine.keys import Keys
from kecore.engine.layers import at_depth
from kecore.engine.value_steps import ValueSettings
from kecore.model import ModelView, SiteId
from kecore.ops import Solution, kv_solve


class HelloConfig(MethodConfig):
    """What may be chosen; the defaults work on any model."""

    depth: float = Field(0.3, ge=0, le=1, description="where the edited layer stands: 0 bottom, 1 top")
    steps: int = Field(25, ge=1, description="evaluations of the loss of a value")
    learning_rate: float = Field(0.1, gt=0, description="first step, relative to the hidden state")
    ridge: float = Field(0.0, ge=0, description="above 0 writes values less exactly and moves weights less")


class Hello:
    """Write each fact as a smallest change of one matrix."""

    name = "hello"
    Config = HelloConfig
    capabilities = Capabilities("weights", batch=True, sequential=True)
    reference = "kecore, write your own method (docs/write-a-method.md); after Meng et al., arXiv:2202.05262"
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> Edit:
        """Work out the edit; the model is as before when this returns."""
        config: HelloConfig = context.config

        def smallest_change(site: SiteId, keys: Keys, residuals: Tensor) -> Solution:
            return kv_solve(keys.mean(), residuals, config.ridge)

        form = ClosedForm(
            layers=at_depth(view, config.depth, config.depth),
            contexts=0,
            context_tokens=0,
            values=ValueSettings(steps=config.steps, learning_rate=config.learning_rate),
            solve=smallest_change,
        )
        return form.plan(view, batch, context, self.name)
