"""KE (KnowledgeEditor): a network reads the fact and gates the gradient, coordinate by coordinate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kecore.model import LinearView, ModelView
from kecore.text import Encoded
from kecore_methods import hparams
from kecore_methods.hparams import HparamsTable
from kecore_methods.meta.factors import Factors, Shifts, group_requests, unit_step
from kecore_methods.meta.learner import GradientConfig, GradientEditor, Network
from kecore_methods.presets import Published

__all__ = ["Ke", "KeConfig"]


class KeConfig(Published, GradientConfig):
    """Configuration; sizes that suit a model of a hundred million parameters."""

    hparams_table: ClassVar[HparamsTable | None] = hparams.KE

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
        projections = {layer: view.layers[layer].site.linear for layer in config.edited_layers(view)}
        self.gates = nn.ModuleDict({str(layer): _Gates(p, hidden, config) for layer, p in projections.items()})
        self.register_buffer("multiplier", torch.ones(()))
        self.multiplier: Tensor

    def normalise(self, factors: Factors) -> None:
        """Take the mean size of the gradient of each matrix."""
        for layer, u in factors.inputs.items():
            delta = factors.deltas[layer]
            gram = (u @ u.transpose(1, 2)) * (delta @ delta.transpose(1, 2))  # ‖Σ δ uᵀ‖² without forming it
            gates: Any = self.gates[str(layer)]
            gates.size.copy_((gram.sum((1, 2)).mean() / (u.shape[-1] * delta.shape[-1])).sqrt())

    def read(self, view: ModelView, items: Sequence[Encoded], factors: Factors) -> Tensor:
        """Return ``h [requests, hidden]``, read from ``x``, the model's own answer ``y`` and the wanted one ``a``."""
        rows: list[Tensor] = []
        for item, answer in zip(items, factors.answers, strict=True):
            x = self._embed(view, item.ids[: item.start])
            y = self._embed(view, answer)
            a = self._embed(view, item.ids[item.start :])
            rows.append(torch.cat([x, self.separator[None], y, self.separator[None], a]))  # [tokens, width]
        packed = nn.utils.rnn.pack_sequence(rows, enforce_sorted=False)
        _, (last_states, _) = self.lstm(packed)  # [directions, requests, hidden]
        return torch.tanh(self.middle(torch.cat([last_states[0], last_states[1]], -1)))

    def _embed(self, view: ModelView, ids: Sequence[int]) -> Tensor:
        """Return the embeddings of tokens ``[tokens, width]``, each at a size of 1.

        Those of different models differ in size by orders of magnitude.
        """
        embedding: Any = view.model.get_input_embeddings()  # type: ignore[operator]
        tokens = torch.tensor(ids, device=embedding.weight.device)
        return nn.functional.layer_norm(embedding(tokens).float(), (len(self.separator),))

    def shifts(self, view: ModelView, items: Sequence[Encoded], factors: Factors, together: int) -> Shifts:
        """Return ``ΔW`` of each request, summed over the requests of a group."""
        h = self.read(view, items, factors)
        shifts: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, u in factors.inputs.items():
            up, down = self.gates[str(layer)](h, u, factors.deltas[layer])
            shifts[layer] = group_requests(up, down, together)
        return shifts

    def objective(self, edit: Tensor, kl: Tensor) -> Tensor:
        """Return the Lagrangian of ``min edit loss subject to KL ≤ margin``, and adapt its multiplier.

        The multiplier rises while the KL is above the margin, and falls while it is below.
        """
        loss = edit + self.multiplier.clone() * (kl - self.config.margin)
        with torch.no_grad():
            # Bounded, or one bad batch would raise it beyond what many good ones can take back.
            excess = (kl / self.config.margin - 1).clamp(max=1)
            self.multiplier.add_(self.config.multiplier_rate * excess).clamp_(min=0)
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
        """Return update factors ``[requests, tokens + 1, d_out]`` and ``[requests, tokens + 1, d_in]``.

        Args:
            h: ``[requests, hidden]``.
            u: ``[requests, tokens, d_in]``.
            delta: ``[requests, tokens, d_out]``.
        """
        # Each [requests, 1, d] of its own width; eta is the scalar step.
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
        """Return a network whose update is a step down the gradient."""
        if not isinstance(config, KeConfig):
            raise TypeError(f"expected a KeConfig, got {type(config).__name__}")
        return KeNetwork(view, config)
