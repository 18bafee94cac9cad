"""UltraEdit: one backward pass, normalised over the session, and a ridge regression; no subject, no statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from kecore.api.config import MethodConfig
from kecore.api.errors import ConfigError
from kecore.api.method import MethodContext
from kecore.api.types import Capabilities
from kecore.batch import RequestBatch
from kecore.edit import LowRank, Update, WeightEdit
from kecore.engine.layers import at_depth
from kecore.memory import Need, backward_bytes, logits_bytes
from kecore.model import ModelView, SiteId
from kecore.ops import kv_solve
from kecore_methods.locate.lifelong import Features, Running, features

__all__ = ["Lifelong", "UltraEdit"]


class Lifelong:
    """The base of UltraEdit and StableEdit, which differ in how gradients are normalised."""

    class Config(MethodConfig):
        """Configuration; lengths are relative, so defaults carry over to any model."""

        layers: tuple[int, ...] | None = Field(
            default=None, description="Edited layers; None takes the layers between depth_first and depth_last."
        )
        depth_first: float = Field(default=0.85, ge=0, le=1, description="Depth of the first edited layer.")
        depth_last: float = Field(default=0.95, ge=0, le=1, description="Depth of the last edited layer.")
        rate: float = Field(
            default=1.0,
            gt=0,
            description="Length of a step at each matrix, relative to the mean norm of its outputs.",
        )
        learning_rate: float | None = Field(
            default=None, gt=0, description="The same as the paper's absolute eta (1e-6 in EasyEdit's set-ups)."
        )
        ridge: float = Field(
            default=0.1, ge=0, description="Weight of the update's own norm, relative to the mean squared norm of keys."
        )
        ridge_lambda: float | None = Field(
            default=None, ge=0, description="The same as an absolute number (1 in EasyEdit)."
        )

        def edited_layers(self, view: ModelView) -> tuple[int, ...]:
            """Return the edited layers, chosen by depth unless given."""
            if self.layers is None:
                return at_depth(view, self.depth_first, self.depth_last)
            if not self.layers:
                raise ConfigError("'layers' is empty; name at least one layer, or leave it out")
            return tuple(sorted({view.layer(i).index for i in self.layers}))

        def needs(self, view: ModelView, batch: RequestBatch) -> list[Need]:
            """Return the memory of one backward pass, and of the features of every predicted token."""
            layers = self.edited_layers(view)
            items = batch.encodings
            tokens = sum(len(item.ids) for item in items)
            target_tokens = sum(len(item.ids) - item.start for item in items)
            longest = max(len(item.ids) for item in items)
            linears = [view.layers[layer].site.linear for layer in layers]
            widths = sum(linear.d_in + linear.d_out for linear in linears)
            token = backward_bytes(view, layers[0]) + target_tokens * logits_bytes(view) // tokens
            return [Need("gradients", {"features": 2 * 4 * target_tokens * widths}, token, tokens, longest)]

    name: ClassVar[str]
    capabilities = Capabilities(kind="weights", batch=True, sequential=True, needs_subject=False)
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> WeightEdit:
        """Plan the edit; running statistics of all edits so far travel in ``context.state``."""
        config: Lifelong.Config = context.config
        layers = config.edited_layers(view)
        updates: dict[SiteId, Update] = {}
        with view.frozen():
            self.prepare_statistics(view, layers, context)
            with context.stages("gradients"):
                layer_features = features(
                    view, context.encoder, batch.encodings, layers, context.memory, context.progress
                )
        with context.stages("solve"):
            for layer, tokens in layer_features.items():
                ridge = config.ridge_lambda
                if ridge is None:
                    ridge = config.ridge * float(tokens.keys.double().square().sum(1).mean())
                site = view.layers[layer].site.id
                steps = self.steps(f"running/{site}", tokens, context)
                solution = kv_solve(tokens.keys.t(), steps.t().float(), ridge)
                updates[site] = LowRank(solution.U, solution.V)
        notes = {"layers": list(layers), "tokens": len(layer_features[layers[0]].keys)}
        return WeightEdit.planned(view, updates, context, method=self.name, requests=batch.requests, notes=notes)

    def prepare_statistics(self, view: ModelView, layers: Sequence[int], context: MethodContext) -> None:
        """Prepare the running statistics before the first edit of a session; UltraEdit needs nothing."""

    def steps(self, name: str, tokens: Features, context: MethodContext) -> Tensor:
        """Return the outputs' changes to be written, ``v = -eta |h^|^2 g^`` with normalised features, ``[n, d_out]``.

        Args:
            name: prefix of the layer's running statistics, which take these tokens in first.
            tokens: keys ``h`` and gradients ``g``.
            context: of the edit.
        """
        config: Lifelong.Config = context.config
        keys, gradients = Running(context.state, f"{name}/keys"), self.running(name, context)
        keys.add(tokens.keys)
        gradients.add(tokens.gradients)
        length = keys.normalised(tokens.keys).square().sum(1, keepdim=True)  # [n, 1]
        eta = config.learning_rate
        if eta is None:
            # Normalised coordinates are about 1, so |h^|^2 is about d_in and |g^| about sqrt(d_out).
            eta = config.rate * tokens.size / (tokens.keys.shape[1] * tokens.gradients.shape[1] ** 0.5)
        return -eta * length * self.normalised(gradients, tokens.gradients, context)

    def running(self, name: str, context: MethodContext) -> Running:
        """Return the running statistics of gradients."""
        return Running(context.state, f"{name}/gradients")

    def normalised(self, running: Running, gradients: Tensor, context: MethodContext) -> Tensor:
        """Return gradients in units of their spread."""
        return running.normalised(gradients)


class UltraEdit(Lifelong):
    """Training-, subject- and memory-free lifelong editing."""

    name = "ultraedit"
    reference = (
        "Gu et al., UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Language Models, TMLR 2026, "
        "arXiv:2505.14679"
    )
