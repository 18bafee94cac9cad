"""KE (KnowledgeEditor): a network reads the fact and gates the gradient, coordinate by coordinate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from kecore.model import LinearView, ModelView
from kecore.text import Encoded
from kecore_methods.meta.factors import Factors, Shifts, grouped, unit_step
from kecore_methods.meta.learner import GradientConfig, GradientEditor, Network

__all__ = ["Ke", "KeConfig"]


class KeConfig(GradientConfig):
    """Configuration; sizes that suit a model of a hundred million parameters."""

    hidden: int = Field(
        default=128, ge=1, description="Width of each direction of the LSTM and of what follows it (kecore's choice)."
    )
    edit_rate: float = Field(
        default=0.2,
        gt=0,
        description="Size of an update beside what the matrix does to a key, before training (kecore's choice).",
    )
    margin: float = Field(
        default=0.01,
        gt=0,
        description="KL that unrelated answers may move by (kecore's choice; the paper lowers its own in training).",
    )
    multiplier_rate: float = Field(
        default=0.5,
        gt=0,
        description="Most that the multiplier moves by in one step (kecore's choice; 0.1 in the training that "
        "docs/methods/ke.md reports).",
    )


class KeNetwork(Network):
    """A bidirectional LSTM over fact and answers, and gates for each edited matrix.

    Args:
        view: the model.
        config: the configuration.
    """

    def __init__(self, view: ModelView, config: KeConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden
        embedding: Any = view.model.get_input_embeddings()  # type: ignore[operator]
        width = int(embedding.weight.shape[1])
        self.separator = nn.Parameter(torch.randn(width))
        self.lstm = nn.LSTM(width, hidden, bidirectional=True, batch_first=True)
        self.middle = nn.Linear(2 * hidden, hidden)
        projections = {layer: view.layers[layer].value_projection for layer in config.edited_layers(view)}
        self.gates = nn.ModuleDict({str(layer): _Gates(p, hidden, config) for layer, p in projections.items()})
        self.register_buffer("multiplier", torch.ones(()))
        self.multiplier: Tensor

    def normalise(self, factors: Factors) -> None:
        """The mean size of the gradient of each matrix."""
        for layer, u in factors.inputs.items():
            delta = factors.deltas[layer]
            gram = (u @ u.transpose(1, 2)) * (delta @ delta.transpose(1, 2))  # ‖Σ δ uᵀ‖² without forming it
            gates: Any = self.gates[str(layer)]
            gates.size.copy_((gram.sum((1, 2)).mean() / (u.shape[-1] * delta.shape[-1])).sqrt())

    def read(self, view: ModelView, items: Sequence[Encoded], factors: Factors) -> Tensor:
        """``h``, one vector a request, from ``x``, the model's own answer ``y`` and the wanted one ``a``."""
        embedding: Any = view.model.get_input_embeddings()  # type: ignore[operator]
        rows: list[Tensor] = []
        for item, said in zip(items, factors.said, strict=True):
            parts = [item.ids[: item.start], said, item.ids[item.start :]]
            ids = [torch.tensor(part, device=embedding.weight.device) for part in parts]
            # Normalised, for embeddings of different models differ in size by orders of magnitude.
            x, y, a = (nn.functional.layer_norm(embedding(p).float(), (len(self.separator),)) for p in ids)
            rows.append(torch.cat([x, self.separator[None], y, self.separator[None], a]))
        packed = nn.utils.rnn.pack_sequence(rows, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)
        return torch.tanh(self.middle(torch.cat([last[0], last[1]], -1)))

    def shifts(self, view: ModelView, items: Sequence[Encoded], factors: Factors, together: int) -> Shifts:
        """``ΔW`` of each request, summed over those of a group."""
        h = self.read(view, items, factors)
        made: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, u in factors.inputs.items():
            up, down = self.gates[str(layer)](h, u, factors.deltas[layer])
            made[layer] = grouped(up, down, together)
        return made

    def objective(self, edit: Tensor, kl: Tensor) -> Tensor:
        """The Lagrangian of ``min edit loss subject to KL ≤ margin``; its multiplier goes up while that is broken."""
        loss = edit + self.multiplier.clone() * (kl - self.config.margin)
        with torch.no_grad():
            # Bounded, or one bad batch would raise it beyond what many good ones can take back.
            broken = (kl / self.config.margin - 1).clamp(max=1)
            self.multiplier.add_(self.config.multiplier_rate * broken).clamp_(min=0)
        return loss


class _Gates(nn.Module):
    """``ΔW = σ(η) (α̂ ⊙ ∇W + β̂)`` with ``α̂ = γ softmax(α)ᵀ`` and ``β̂ = δ softmax(β)ᵀ``, in factors.

    In units in which nothing depends on the model's size: the gradient over its mean size, softmax over its mean, and
    the update over :func:`unit_step`. Before training it is a step down the gradient.
    """

    def __init__(self, projection: LinearView, hidden: int, config: KeConfig) -> None:
        super().__init__()
        self.widths = [projection.d_in, projection.d_in, projection.d_out, projection.d_out, 1]
        self.head = nn.Linear(hidden, sum(self.widths))
        nn.init.normal_(self.head.weight, std=1e-3)
        _, _, gamma, _, _ = self.head.bias.data.zero_().split(self.widths)
        gamma.fill_(-1)
        self.register_buffer("size", torch.ones(()))
        self.size: Tensor
        self.unit = 2 * config.edit_rate * unit_step(projection)

    def forward(self, h: Tensor, u: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Update factors ``[requests, tokens + 1, d_out]`` and ``[requests, tokens + 1, d_in]``."""
        alpha, beta, gamma, shift, eta = self.head(h)[:, None].split(self.widths, -1)
        d_in = u.shape[-1]
        strength = self.unit * torch.sigmoid(eta)
        up = torch.cat([strength / self.size * gamma * delta, strength * shift], 1)
        return up, d_in * torch.cat([alpha.softmax(-1) * u, beta.softmax(-1)], 1)


class Ke(GradientEditor):
    """KnowledgeEditor."""

    name = "ke"
    Config = KeConfig
    reference = "De Cao et al., Editing Factual Knowledge in Language Models, EMNLP 2021, arXiv:2104.08164"

    def network(self, view: ModelView, config: GradientConfig) -> Network:
        """A network whose update is a step down the gradient."""
        if not isinstance(config, KeConfig):
            raise TypeError(f"expected a KeConfig, got {type(config).__name__}")
        return KeNetwork(view, config)
