"""Lifelong normalisation: edits from one backward pass, scaled by statistics that run over the whole session.

The methods built on it (UltraEdit, arXiv 2505.14679; StableEdit, arXiv 2605.11836) optimise nothing and look for no
subject. Where the model predicts a target's tokens they read, at each edited matrix, what goes in (a key) and the
gradient of the loss with respect to what comes out. Both are normalised by their mean and spread over all tokens of
all edits so far, which is what keeps a long sequence stable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kecore.api.errors import NonFiniteError
from kecore.api.progress import Progress, silent
from kecore.memory import backward_bytes
from kecore.model import ModelView
from kecore.text import Encoded, Encoder

__all__ = ["Features", "Running", "features"]

_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Features:
    """What the value projection of one layer sees of ``n`` predicted tokens.

    Args:
        keys: ``[n, d_in]`` float32, its inputs.
        gradients: ``[n, d_out]`` float32, of each request's negative log-likelihood, with respect to its outputs.
        size: mean norm of its outputs.
    """

    keys: Tensor
    gradients: Tensor
    size: float


def features(
    view: ModelView,
    encoder: Encoder,
    texts: Sequence[Encoded],
    layers: Sequence[int],
    memory: int = 2 << 30,
    progress: Progress = silent,
) -> dict[int, Features]:
    """Keys and gradients at the tokens that predict a continuation, one backward pass for all layers.

    Args:
        view: the model, frozen by the caller.
        encoder: its tokenizer.
        texts: prompts with their continuations.
        layers: whose value projections.
        memory: bytes of activations per micro-batch.
        progress: called as ``progress("gradients", done, total)``.

    Returns:
        The features of each layer, in the order of ``texts`` and of their tokens.

    Raises:
        NonFiniteError: a gradient is not finite.
    """
    found: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {layer: [] for layer in layers}
    most = max(1, memory // backward_bytes(view, min(layers)) // max(len(text.ids) for text in texts))
    for begin in range(0, len(texts), most):
        progress("gradients", begin, len(texts))
        for layer, part in _backward(view, encoder, texts[begin : begin + most], layers).items():
            found[layer].append(part)
    progress("gradients", len(texts), len(texts))
    out: dict[int, Features] = {}
    for layer, parts in found.items():
        keys, gradients, outputs = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        if not bool(torch.isfinite(gradients).all()):
            raise NonFiniteError(f"the gradient at layer {layer} is not finite; the model overflows on these prompts")
        out[layer] = Features(keys, gradients, float(outputs.norm(dim=1).mean()))
    return out


def _backward(
    view: ModelView, encoder: Encoder, texts: Sequence[Encoded], layers: Sequence[int]
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    # A target's last token is predicted, never read.
    ids = [text.ids[:-1] for text in texts]
    rows = encoder.rows(ids).to(view.device)
    places = [(i, j - 1, text.ids[j]) for i, text in enumerate(texts) for j in range(text.start, len(text.ids))]
    row, column, token = torch.tensor(places, device=view.device).t()
    # The gradient with respect to an output is that of a zero added to it.
    added = {
        layer: torch.zeros(
            (*rows.input_ids.shape, view.layers[layer].value_projection.d_out),
            dtype=view.dtype,
            device=view.layers[layer].value_projection.weight.device,
            requires_grad=True,
        )
        for layer in layers
    }
    with torch.enable_grad():
        out = view.forward(
            rows,
            keys=layers,
            values=layers,
            change={layer: lambda output, zero=zero: output + zero for layer, zero in added.items()},
            at=(row, column),
        )
        logits = out.logits.float()  # type: ignore[union-attr]
        loss = torch.nn.functional.cross_entropy(logits, token, reduction="sum")
        gradients = torch.autograd.grad(loss, list(added.values()))
    return {
        layer: tuple(
            x.detach()[row.to(x.device), column.to(x.device)].float().cpu()
            for x in (out.keys[layer], gradient, out.values[layer])
        )
        for layer, gradient in zip(added, gradients, strict=True)
    }  # type: ignore[return-value]


class Running:
    """Mean and spread of vectors over a session, in a method's state; exact, in whatever portions they come.

    The first observation is a zero. It weighs one token, so it is soon forgotten, and it gives a single token a
    spread: one alone is its own mean, and would vanish.

    Args:
        state: tensors that survive from one edit to the next; read and written.
        name: whose vectors.
        full: keep the whole covariance instead of each coordinate's variance.
    """

    def __init__(self, state: dict[str, Tensor], name: str, *, full: bool = False) -> None:
        self.state, self.name, self.full = state, name, full

    @property
    def count(self) -> int:
        """Vectors so far, the zero included."""
        return int(self.state.get(f"{self.name}/count", torch.tensor(1)))

    def add(self, vectors: Tensor) -> None:
        """Take in ``[n, d]`` vectors (Chan et al.'s pairwise update)."""
        new, d = vectors.double(), vectors.shape[1]
        mean = self.state.get(f"{self.name}/mean", torch.zeros(d)).double()
        scatter = self.state.get(f"{self.name}/scatter", torch.zeros((d, d) if self.full else d)).double()
        old, n = self.count, len(new)
        step = new.mean(0) - mean
        apart = new - new.mean(0)
        if self.full:
            scatter = scatter + apart.t() @ apart + torch.outer(step, step) * (old * n / (old + n))
        else:
            scatter = scatter + apart.square().sum(0) + step.square() * (old * n / (old + n))
        self.state[f"{self.name}/count"] = torch.tensor(old + n)
        self.state[f"{self.name}/mean"] = (mean + step * (n / (old + n))).float()
        self.state[f"{self.name}/scatter"] = scatter.float()

    def normalised(self, vectors: Tensor) -> Tensor:
        """``(x - mean) / spread`` of each coordinate, ``[n, d]`` float64."""
        variance = self._scatter() / self.count
        variance = variance.diagonal() if self.full else variance
        # A coordinate that never moves has no spread, and nothing to say.
        spread = variance.sqrt().clamp(min=_TINY * float(variance.max().sqrt()) + torch.finfo(torch.float64).tiny)
        return (vectors.double() - self.state[f"{self.name}/mean"].double()) / spread

    def whitened(self, vectors: Tensor, ridge: float) -> Tensor:
        """``(C + ridge·mean(diag C)·I)^(-1/2) (x - mean)`` with the covariance ``C``, ``[n, d]`` float64."""
        values, basis = torch.linalg.eigh(self._scatter() / self.count)
        values = values.clamp(min=0) + ridge * float(values.mean()) + torch.finfo(torch.float64).tiny
        apart = vectors.double() - self.state[f"{self.name}/mean"].double()
        return apart @ (basis * values.rsqrt()) @ basis.t()

    def _scatter(self) -> Tensor:
        return self.state[f"{self.name}/scatter"].double()
