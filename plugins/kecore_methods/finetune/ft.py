"""Fine-tuning one matrix on the facts: the baselines FT-L and FT-M."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kecore.config import MethodConfig
from kecore.edit import Dense, WeightEdit
from kecore.editing.layers import at_depth
from kecore.errors import NonFiniteError
from kecore.memory import Need, backward_bytes, logits_bytes
from kecore.method import MethodContext
from kecore.model_view import ModelView
from kecore.text import Encoder, Rows
from kecore.types import Capabilities, EditRequest, check_conflicts, unique

__all__ = ["FtL", "FtM"]

Objective = Literal["prompt_last", "target_new"]


class FineTuneConfig(MethodConfig):
    """Configuration of both baselines; defaults from EasyEdit's Llama-2-7B set-up, made relative."""

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
    norm_constraint: float | None = Field(
        default=None,
        gt=0,
        description="Largest change of any weight (L-infinity, arXiv 2012.00363); None for no bound.",
    )

    def tuned_layer(self, view: ModelView) -> int:
        """The layer, chosen by depth unless given."""
        return at_depth(view, self.depth, self.depth)[0] if self.layer is None else view.layer(self.layer).index

    def needs(self, view: ModelView, encoder: Encoder, requests: Sequence[EditRequest]) -> list[Need]:
        """The change with its gradient and Adam's moments, and a batch of requests, which is not cut further."""
        layer = self.tuned_layer(view)
        encoded = [encoder.encode(request.text, request.target) for request in requests]
        every, longest = sum(len(item.ids) for item in encoded), max(len(item.ids) for item in encoded)
        places = sum(len(item.ids) - item.start for item in encoded)
        projection = view.layers[layer].value_projection
        parts = {
            "change, gradient and moments": 4 * 4 * projection.d_out * projection.d_in,
            "hidden states below the layer": every * view.width * view.dtype.itemsize,
        }
        batch = longest * min(self.batch_size, len(encoded))
        token = backward_bytes(view, layer) + places * logits_bytes(view) // every
        return [Need("tune", parts, token, batch, batch)]


class _FineTune:
    """Both baselines: they differ in what the loss asks for."""

    Config = FineTuneConfig
    objective: ClassVar[Objective]
    name: ClassVar[str]
    capabilities = Capabilities(kind="weights", batch=True, sequential=True)
    api = (1, 1)

    def plan(self, view: ModelView, requests: Sequence[EditRequest], context: MethodContext) -> WeightEdit:
        """Tune the matrix on all requests; the model is bitwise as before when this returns."""
        config: FineTuneConfig = context.config
        check_conflicts(requests)
        asked = unique(requests)
        layer = config.tuned_layer(view)
        projection = view.layers[layer].value_projection
        with view.frozen(), context.stages("tune"):
            delta, losses = _tune(view, context, asked, layer, config, self.objective)
        return WeightEdit(
            updates={projection.name: Dense(delta)},
            base=context.fingerprint(view),
            method=self.name,
            transposed=frozenset({projection.name}) if projection.transposed else frozenset(),
            config=config.to_json(),
            requests=tuple(asked),
            seed=context.seed,
            notes={"layers": [layer], "loss": losses},
        )


class FtL(_FineTune):
    """FT-L: raise the target's tokens at the prompt's last token, in one matrix."""

    name = "ft-l"
    objective = "prompt_last"
    reference = "Zhu et al., Modifying Memories in Transformer Models, 2020, arXiv:2012.00363"


class FtM(_FineTune):
    """FT-M: cross-entropy on the target's tokens only, in one matrix."""

    name = "ft-m"
    objective = "target_new"
    reference = "Zhang et al., A Comprehensive Study of Knowledge Editing for LLMs, 2024, arXiv:2401.01286"


def _tune(
    view: ModelView,
    context: MethodContext,
    requests: list[EditRequest],
    layer: int,
    config: FineTuneConfig,
    objective: Objective,
) -> tuple[Tensor, list[float]]:
    projection = view.layers[layer].value_projection
    weight = projection.weight
    rate = config.learning_rate or config.relative_learning_rate * float(weight.float().square().mean().sqrt())
    delta = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=rate)
    batches = [
        _Batch(view, context.encoder, requests[i : i + config.batch_size], layer, objective)
        for i in range(0, len(requests), config.batch_size)
    ]
    losses: list[float] = []
    for step in range(config.steps):
        total = 0.0
        for batch in batches:
            optimizer.zero_grad()
            loss = batch.loss(delta)
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError("the fine-tuning loss became NaN or infinite; lower the learning rate")
            loss.backward()
            optimizer.step()
            if config.norm_constraint is not None:
                with torch.no_grad():
                    delta.clamp_(-config.norm_constraint, config.norm_constraint)
            total += float(loss.detach()) * batch.count / len(requests)
        losses.append(round(total, 5))
        context.progress("tune", step + 1, config.steps)
        if total < config.stop_loss:
            break
    return delta.detach().cpu(), losses


class _Batch:
    """Some requests as token rows; the layers below the tuned one are run once."""

    def __init__(
        self,
        view: ModelView,
        encoder: Encoder,
        requests: Sequence[EditRequest],
        layer: int,
        objective: Objective,
    ) -> None:
        self.view, self.layer, self.count = view, layer, len(requests)
        encoded = [encoder.encode(request.text, request.target) for request in requests]
        if objective == "prompt_last":
            ids = [item.ids[: item.start] for item in encoded]
            places = [(i, e.start - 1, token) for i, e in enumerate(encoded) for token in e.ids[e.start :]]
        else:
            ids = [item.ids for item in encoded]
            places = [(i, j - 1, e.ids[j]) for i, e in enumerate(encoded) for j in range(e.start, len(e.ids))]
        self.rows: Rows = encoder.rows(ids).to(view.device)
        self.row, self.column, self.token = torch.tensor(places, device=view.device).t()
        self.length = torch.bincount(self.row).float()
        self.resume = None
        if layer:
            with torch.no_grad():
                below = view.forward(self.rows, stop=layer - 1, hidden=[layer - 1]).hidden[layer - 1]
            self.resume = (layer, below)

    def loss(self, delta: Tensor) -> Tensor:
        """Mean over requests of the mean negative log-likelihood of the target's tokens."""
        out = self.view.forward(self.rows, resume=self.resume, at=(self.row, self.column), add={self.layer: delta})
        logits = out.logits.float()  # type: ignore[union-attr]
        nll = logits.logsumexp(-1) - logits.gather(1, self.token[:, None]).squeeze(1)
        return (nll / self.length[self.row]).sum() / self.count
