"""Fine-tuning one matrix on the facts: the baselines FT-L and FT-M."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kecore.api.method import MethodContext
from kecore.api.types import Capabilities, EditRequest
from kecore.batch import RequestBatch
from kecore.edit import Dense, WeightEdit
from kecore.engine.tuning import Objective, PreservingConfig, Targets, batch_need, choose_layer, estimate_items, train
from kecore.memory import Need
from kecore.model import ModelView
from kecore_methods import hparams
from kecore_methods.hparams import HparamsTable
from kecore_methods.presets import Published

__all__ = ["FtL", "FtM", "MatrixConfig", "tune_matrix"]


class MatrixConfig(PreservingConfig):
    """Configuration of methods that tune one matrix; defaults from EasyEdit's Llama-2-7B set-up, made relative."""

    layer: int | None = Field(
        default=None, ge=0, description="Layer whose value projection is tuned; None goes by depth."
    )
    depth: float = Field(default=0.68, ge=0, le=1, description="Depth of the tuned layer (21 of 32 in EasyEdit).")
    steps: int = Field(default=25, ge=1, description="Passes over the requests.")
    learning_rate: float | None = Field(default=None, gt=0, description="Of Adam; None takes the relative one.")
    relative_learning_rate: float = Field(
        default=0.025,
        gt=0,
        description="Of Adam, relative to the matrix's root mean square (5e-4 at the 0.02 of Llama-2-7B).",
    )
    batch_size: int = Field(default=32, ge=1, description="Requests per update.")
    stop_loss: float = Field(default=1e-2, ge=0, description="Tuning ends when a pass has a mean loss below this.")
    skip_loss: float = Field(
        default=0.0,
        ge=0,
        description="A batch with a mean loss below this is left out of a pass (1e-2 in LocFT's released code).",
    )

    def tuned_layer(self, view: ModelView) -> int:
        """Return the tuned layer, chosen by depth unless given."""
        return choose_layer(view, self.layer, self.depth)

    def rate(self, weight: Tensor) -> float:
        """Return Adam's learning rate for a weight."""
        if self.learning_rate is not None:
            return self.learning_rate
        return self.relative_learning_rate * float(weight.float().square().mean().sqrt())

    def needs(self, view: ModelView, batch: RequestBatch) -> list[Need]:
        """Return the memory of the change, its gradient and moments, and of a batch of requests, which is not cut."""
        layer = self.tuned_layer(view)
        items = estimate_items(batch.encodings, 0, 0, self.others)
        projection = view.layers[layer].site.linear
        parts = {
            "change, gradient and moments": 4 * 4 * projection.d_out * projection.d_in,
            "hidden states below the layer": sum(len(e.ids) for e in items) * view.width * view.dtype.itemsize,
        }
        return [batch_need(view, items, self.batch_size * (1 + self.others), layer, parts, epochs=self.steps)]


class FineTuneConfig(Published, MatrixConfig):
    """Configuration of both baselines."""

    norm_constraint: float | None = Field(
        default=None,
        gt=0,
        description="Largest change of any weight (L-infinity, arXiv 2012.00363); None for no bound.",
    )


class _FineTune:
    """Both baselines: they differ in what the loss asks for."""

    Config: ClassVar[type[FineTuneConfig]]
    objective: ClassVar[Objective]
    name: ClassVar[str]
    capabilities = Capabilities(kind="weights", batch=True, sequential=True, needs_subject=False)
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> WeightEdit:
        """Tune the matrix on all requests; the model is bitwise as before when this returns."""
        config: FineTuneConfig = context.config
        layer = config.tuned_layer(view)
        encoder, size = context.encoder, config.batch_size
        requests, items = batch.requests, batch.encodings

        def bound(delta: Tensor) -> None:
            if config.norm_constraint is not None:
                delta.clamp_(-config.norm_constraint, config.norm_constraint)

        with view.frozen(), context.stages("tune"):
            batches: list[Targets] = []
            for start in range(0, len(requests), size):
                chunk = slice(start, start + size)
                preserved = config.prompts_to_preserve(encoder, requests[chunk])
                batches.append(Targets(view, encoder, items[chunk], layer, self.objective, preserved))
            return tune_matrix(view, context, requests, self.name, lambda _: batches, bound)


class FtL(_FineTune):
    """FT-L: raise the target's tokens at the prompt's last token, in one matrix."""

    class Config(FineTuneConfig):
        """Configuration of FT-L."""

        preset_file: ClassVar[str] = "ft-l"
        hparams_table: ClassVar[HparamsTable | None] = hparams.FT_L

    name = "ft-l"
    objective = "prompt_last"
    reference = "Zhu et al., Modifying Memories in Transformer Models, 2020, arXiv:2012.00363"


class FtM(_FineTune):
    """FT-M: cross-entropy on the target's tokens only, in one matrix."""

    class Config(FineTuneConfig):
        """Configuration of FT-M."""

        preset_file: ClassVar[str] = "ft-m"
        hparams_table: ClassVar[HparamsTable | None] = hparams.FT_M

    name = "ft-m"
    objective = "target_new"
    reference = "Zhang et al., A Comprehensive Study of Knowledge Editing for LLMs, 2024, arXiv:2401.01286"


def tune_matrix(
    view: ModelView,
    context: MethodContext,
    requests: Sequence[EditRequest],
    method: str,
    batches: Callable[[int], Sequence[Targets]],
    bound: Callable[[Tensor], None] = lambda _: None,
) -> WeightEdit:
    """Tune the change of one layer's value projection; the weight itself is never written.

    Args:
        view: the model, frozen.
        context: its configuration is a :class:`MatrixConfig`.
        requests: the requests that the edit names.
        method: name of the method.
        batches: the batches of each pass.
        bound: applied to the change ``[d_out, d_in]`` after every update.
    """
    config: MatrixConfig = context.config
    layer = config.tuned_layer(view)
    site = view.layers[layer].site
    weight = site.linear.weight
    delta = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device, requires_grad=True)

    @torch.no_grad()
    def after(_: int) -> None:
        bound(delta)

    losses = train(
        context,
        parameters=[delta],
        rate=config.rate(weight),
        epochs=config.steps,
        batches=batches,
        loss=lambda batch: batch.loss({layer: delta}),
        stop=config.stop_loss,
        skip=config.skip_loss,
        after=after,
    )
    return WeightEdit.planned(
        view,
        {site.id: Dense(delta.detach().cpu())},
        context,
        method=method,
        requests=requests,
        notes={"layers": [layer], "loss": losses},
    )
