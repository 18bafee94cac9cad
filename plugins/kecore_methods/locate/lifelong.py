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
from kecore.model.sites import Key, Value
from kecore.text import Encoded, Encoder

__all__ = ["Features", "Running", "features"]

_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Features:
    """Keys and gradients of ``n`` predicted tokens at the value projection of one layer.

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
    """Return keys and gradients at the tokens that predict a continuation, from one backward pass for all layers.

    Args:
        view: the model, frozen by the caller.
        encoder: its tokenizer.
        texts: prompts with their continuations.
        layers: the layers of the value projections.
        memory: bytes of activations per micro-batch.
        progress: called as ``progress("gradients", done, total)``.

    Returns:
        The features of each layer, in the order of ``texts`` and of their tokens.

    Raises:
        NonFiniteError: a gradient is not finite.
    """
    chunks: dict[int, list[_Tokens]] = {layer: [] for layer in layers}
    longest = max(len(text.ids) for text in texts)
    texts_at_once = max(1, memory // backward_bytes(view, min(layers)) // longest)
    for begin in range(0, len(texts), texts_at_once):
        progress("gradients", begin, len(texts))
        for layer, tokens in _backward(view, encoder, texts[begin : begin + texts_at_once], layers).items():
            chunks[layer].append(tokens)
    progress("gradients", len(texts), len(texts))
    by_layer: dict[int, Features] = {}
    for layer, layer_chunks in chunks.items():
        keys = torch.cat([chunk.keys for chunk in layer_chunks])
        gradients = torch.cat([chunk.gradients for chunk in layer_chunks])
        outputs = torch.cat([chunk.outputs for chunk in layer_chunks])
        if not bool(torch.isfinite(gradients).all()):
            raise NonFiniteError(f"the gradient at layer {layer} is not finite; the model overflows on these prompts")
        by_layer[layer] = Features(keys, gradients, size=float(outputs.norm(dim=1).mean()))
    return by_layer


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Keys ``[n, d_in]``, gradients and outputs ``[n, d_out]`` of the predicted tokens of some texts."""

    keys: Tensor
    gradients: Tensor
    outputs: Tensor


def _backward(view: ModelView, encoder: Encoder, texts: Sequence[Encoded], layers: Sequence[int]) -> dict[int, _Tokens]:
    """Run the texts forward and backward once, and return what each layer has at the predicted tokens."""
    # A target's last token is predicted, never read.
    ids = [text.ids[:-1] for text in texts]
    rows = encoder.rows(ids).to(view.device)
    targets: list[tuple[int, int, int]] = []  # row, column and id of each predicted token
    for index, text in enumerate(texts):
        targets += [(index, j - 1, text.ids[j]) for j in range(text.start, len(text.ids))]
    row, column, token = torch.tensor(targets, device=view.device).t()
    # The gradient with respect to an output is that of a zero added to it.
    added: dict[int, Tensor] = {}
    for layer in layers:
        projection = view.layers[layer].site.linear
        shape = (*rows.input_ids.shape, projection.d_out)
        added[layer] = torch.zeros(shape, dtype=view.dtype, device=projection.weight.device, requires_grad=True)
    with torch.enable_grad():
        out = view.run(
            rows,
            taps=[*map(Key, layers), *map(Value, layers)],
            patches={Value(layer): zero.add for layer, zero in added.items()},
            at=(row, column),
        )
        logits = out.logits.float()
        loss = torch.nn.functional.cross_entropy(logits, token, reduction="sum")
        gradients = torch.autograd.grad(loss, list(added.values()))

    def at_targets(x: Tensor) -> Tensor:
        """Return ``[n, d]`` of ``[rows, width, d]``."""
        return x.detach()[row.to(x.device), column.to(x.device)].float().cpu()

    tokens: dict[int, _Tokens] = {}
    for layer, gradient in zip(added, gradients, strict=True):
        tokens[layer] = _Tokens(
            keys=at_targets(out[Key(layer)]), gradients=at_targets(gradient), outputs=at_targets(out[Value(layer)])
        )
    return tokens


class Running:
    """Mean and spread of vectors over a session, in a method's state; exact, in whatever portions they come.

    The first observation is a zero. It weighs one token, so it is soon forgotten, and it gives a single token a
    spread: one alone is its own mean, and would vanish.

    Args:
        state: tensors that survive from one edit to the next; read and written.
        name: prefix of the tensors in the state.
        full: accumulate the whole covariance instead of each coordinate's variance.
    """

    def __init__(self, state: dict[str, Tensor], name: str, *, full: bool = False) -> None:
        self.state, self.name, self.full = state, name, full

    @property
    def count(self) -> int:
        """Number of vectors so far, the zero included."""
        return int(self.state.get(f"{self.name}/count", torch.tensor(1)))

    def add(self, vectors: Tensor) -> None:
        """Take in ``[n, d]`` vectors (Chan et al.'s pairwise update)."""
        vectors, d = vectors.double(), vectors.shape[1]
        scatter_shape = (d, d) if self.full else (d,)
        mean = self.state.get(f"{self.name}/mean", torch.zeros(d)).double()
        scatter = self.state.get(f"{self.name}/scatter", torch.zeros(scatter_shape)).double()
        old_count, new_count = self.count, len(vectors)
        count = old_count + new_count
        step = vectors.mean(0) - mean  # from the old mean to that of the new vectors
        centred = vectors - vectors.mean(0)
        if self.full:
            scatter = scatter + centred.t() @ centred + torch.outer(step, step) * (old_count * new_count / count)
        else:
            scatter = scatter + centred.square().sum(0) + step.square() * (old_count * new_count / count)
        self.state[f"{self.name}/count"] = torch.tensor(count)
        self.state[f"{self.name}/mean"] = (mean + step * (new_count / count)).float()
        self.state[f"{self.name}/scatter"] = scatter.float()

    def normalised(self, vectors: Tensor) -> Tensor:
        """Return ``(x - mean) / spread`` of each coordinate, ``[n, d]`` float64."""
        variance = self._scatter() / self.count
        if self.full:
            variance = variance.diagonal()
        # A coordinate that never moves has no spread, and carries nothing.
        spread = variance.sqrt().clamp(min=_TINY * float(variance.max().sqrt()) + torch.finfo(torch.float64).tiny)
        return (vectors.double() - self.state[f"{self.name}/mean"].double()) / spread

    def whitened(self, vectors: Tensor, ridge: float) -> Tensor:
        """Return ``(C + ridge·mean(diag C)·I)^(-1/2) (x - mean)`` with the covariance ``C``, ``[n, d]`` float64."""
        eigenvalues, basis = torch.linalg.eigh(self._scatter() / self.count)
        eigenvalues = eigenvalues.clamp(min=0) + ridge * float(eigenvalues.mean()) + torch.finfo(torch.float64).tiny
        centred = vectors.double() - self.state[f"{self.name}/mean"].double()
        return centred @ (basis * eigenvalues.rsqrt()) @ basis.t()

    def _scatter(self) -> Tensor:
        return self.state[f"{self.name}/scatter"].double()
