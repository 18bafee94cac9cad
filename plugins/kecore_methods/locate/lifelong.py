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

from kecore.api.errors import ConfigError, NonFiniteError, RequestError
from kecore.api.progress import Progress, silent
from kecore.engine.layers import linear_maps
from kecore.memory import backward_bytes
from kecore.model import ModelView
from kecore.model.linear import LinearView
from kecore.model.sites import ModuleInput, ModuleOutput
from kecore.text import Encoded, Encoder

__all__ = ["Features", "Matrix", "Running", "features", "named_matrices", "value_matrices"]

_TINY = 1e-12
_LEAST_EIGENVALUE = 1e-6


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix that is edited.

    Args:
        path: of its module.
        layer: index of its layer.
        linear: the matrix.
        name: of its running statistics: a value projection's site, another matrix' path.
    """

    path: str
    layer: int
    linear: LinearView
    name: str


@dataclass(frozen=True, slots=True)
class Features:
    """Keys and gradients of ``n`` predicted tokens at one matrix.

    Args:
        keys: ``[n, d_in]`` float32, its inputs.
        gradients: ``[n, d_out]`` float32, of each request's negative log-likelihood, with respect to its outputs.
        size: mean norm of its outputs.
    """

    keys: Tensor
    gradients: Tensor
    size: float


def value_matrices(view: ModelView, layers: Sequence[int]) -> list[Matrix]:
    """Return the value projections of some layers."""
    matrices: list[Matrix] = []
    for layer in layers:
        site = view.layers[layer].site
        matrices.append(Matrix(site.linear.name.removesuffix(".weight"), layer, site.linear, str(site.id)))
    return matrices


def named_matrices(view: ModelView, names: Sequence[str]) -> list[Matrix]:
    """Return the linear maps of decoder layers that are named by the ends of their paths.

    Args:
        view: the model.
        names: such as ``layers.11.mlp.gate_proj``.

    Raises:
        ConfigError: a name fits none of them.
    """
    names_of_values = {matrix.path: matrix.name for matrix in value_matrices(view, range(len(view.layers)))}
    known: list[Matrix] = []
    for layer in range(len(view.layers)):
        for path, linear in linear_maps(view, [layer]).items():
            known.append(Matrix(path, layer, linear, names_of_values.get(path, path)))
    matrices: list[Matrix] = []
    for name in names:
        fitting = [matrix for matrix in known if f".{matrix.path}".endswith(f".{name}")]
        if not fitting:
            paths = [matrix.path for matrix in known if matrix.layer == 0]
            raise ConfigError(f"no linear map's name ends in '{name}'; those of the first layer: {', '.join(paths)}")
        matrices += [matrix for matrix in fitting if matrix not in matrices]
    return matrices


def features(
    view: ModelView,
    encoder: Encoder,
    texts: Sequence[Encoded],
    matrices: Sequence[Matrix],
    memory: int = 2 << 30,
    progress: Progress = silent,
) -> list[Features]:
    """Return keys and gradients at the tokens that predict a continuation, from one backward pass for all matrices.

    Args:
        view: the model, frozen by the caller.
        encoder: its tokenizer.
        texts: prompts with their continuations.
        matrices: the matrices.
        memory: bytes of activations per micro-batch.
        progress: called as ``progress("gradients", done, total)``.

    Returns:
        The features of each matrix, in the order of ``texts`` and of their tokens.

    Raises:
        NonFiniteError: a gradient is not finite.
    """
    chunks: list[list[_Tokens]] = [[] for _ in matrices]
    longest = max(len(text.ids) for text in texts)
    lowest = min(matrix.layer for matrix in matrices)
    texts_at_once = max(1, memory // backward_bytes(view, lowest) // longest)
    for begin in range(0, len(texts), texts_at_once):
        progress("gradients", begin, len(texts))
        tokens = _backward(view, encoder, texts[begin : begin + texts_at_once], matrices)
        for matrix_chunks, chunk in zip(chunks, tokens, strict=True):
            matrix_chunks.append(chunk)
    progress("gradients", len(texts), len(texts))
    of_matrices: list[Features] = []
    for matrix, matrix_chunks in zip(matrices, chunks, strict=True):
        keys = torch.cat([chunk.keys for chunk in matrix_chunks])
        gradients = torch.cat([chunk.gradients for chunk in matrix_chunks])
        outputs = torch.cat([chunk.outputs for chunk in matrix_chunks])
        if not bool(torch.isfinite(gradients).all()):
            raise NonFiniteError(f"the gradient at {matrix.path} is not finite; the model overflows on these prompts")
        of_matrices.append(Features(keys, gradients, size=float(outputs.norm(dim=1).mean())))
    return of_matrices


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Keys ``[n, d_in]``, gradients and outputs ``[n, d_out]`` of the predicted tokens of some texts."""

    keys: Tensor
    gradients: Tensor
    outputs: Tensor


def _backward(view: ModelView, encoder: Encoder, texts: Sequence[Encoded], matrices: Sequence[Matrix]) -> list[_Tokens]:
    """Run the texts forward and backward once, and return what each matrix has at the predicted tokens."""
    # A target's last token is predicted, never read.
    ids = [text.ids[:-1] for text in texts]
    rows = encoder.rows(ids).to(view.device)
    targets: list[tuple[int, int, int]] = []  # row, column and id of each predicted token
    for index, text in enumerate(texts):
        targets += [(index, j - 1, text.ids[j]) for j in range(text.start, len(text.ids))]
    row, column, token = torch.tensor(targets, device=view.device).t()
    # The gradient with respect to an output is that of a zero added to it.
    added: list[Tensor] = []
    for matrix in matrices:
        shape = (*rows.input_ids.shape, matrix.linear.d_out)
        device = matrix.linear.weight.device
        added.append(torch.zeros(shape, dtype=view.dtype, device=device, requires_grad=True))
    inputs = [ModuleInput(matrix.linear.module) for matrix in matrices]
    outputs = [ModuleOutput(matrix.linear.module) for matrix in matrices]
    with torch.enable_grad():
        out = view.run(
            rows,
            taps=[*inputs, *outputs],
            patches={site: zero.add for site, zero in zip(outputs, added, strict=True)},
            at=(row, column),
        )
        logits = out.logits.float()
        loss = torch.nn.functional.cross_entropy(logits, token, reduction="sum")
        gradients = torch.autograd.grad(loss, added)

    def at_targets(x: Tensor) -> Tensor:
        """Return ``[n, d]`` of ``[rows, width, d]``."""
        return x.detach()[row.to(x.device), column.to(x.device)].float().cpu()

    tokens: list[_Tokens] = []
    for source, target, gradient in zip(inputs, outputs, gradients, strict=True):
        keys, values = at_targets(out[source]), at_targets(out[target])
        tokens.append(_Tokens(keys=keys, gradients=at_targets(gradient), outputs=values))
    return tokens


class Running:
    """Mean and spread of vectors over a session, in a method's state; exact, in whatever portions they come.

    Args:
        state: tensors that survive from one edit to the next; read and written.
        name: prefix of the tensors in the state.
        full: accumulate the whole covariance instead of each coordinate's variance.
        zero: the first observation is a zero. It weighs one token, so it is soon forgotten, and it gives a single token
            a spread: one alone is its own mean, and would vanish. Without it the spread is that of a sample, as
            released.
    """

    def __init__(self, state: dict[str, Tensor], name: str, *, full: bool = False, zero: bool = True) -> None:
        self.state, self.name, self.full, self.zero = state, name, full, zero

    @property
    def count(self) -> int:
        """Number of vectors so far, the zero included."""
        return int(self.state.get(f"{self.name}/count", torch.tensor(int(self.zero))))

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
        """Return ``(x - mean) / spread`` of each coordinate, ``[n, d]`` float64.

        Raises:
            RequestError: a single vector was taken in, which has no spread.
        """
        if self.count < 2:
            raise RequestError(
                "the running statistics have seen one token, which has no spread, so nothing can be written; edit more "
                "facts at once, or begin the statistics with a zero (start=zero)"
            )
        degrees = self.count if self.zero else self.count - 1
        variance = self._scatter() / degrees
        if self.full:
            variance = variance.diagonal()
        # A coordinate that never moves has no spread, and carries nothing.
        spread = variance.sqrt().clamp(min=_TINY * float(variance.max().sqrt()) + torch.finfo(torch.float64).tiny)
        return self._centred(vectors) / spread

    def whitened(self, vectors: Tensor, ridge: float) -> Tensor:
        """Return ``(C + ridge·mean(diag C)·I)^(-1/2) (x - mean)`` with the covariance ``C``, ``[n, d]`` float64."""
        eigenvalues, basis = torch.linalg.eigh(self._scatter() / self.count)
        eigenvalues = eigenvalues.clamp(min=0) + ridge * float(eigenvalues.mean()) + torch.finfo(torch.float64).tiny
        return self._centred(vectors) @ (basis * eigenvalues.rsqrt()) @ basis.t()

    def whitened_once_full(self, vectors: Tensor) -> Tensor:
        """Return whitened vectors as StableEdit's release does, ``[n, d]`` float64.

        Until more vectors than directions were seen, each coordinate is normalised alone. Then the covariance is the
        mean of an inverse Wishart distribution, ``scatter / (n - d - 1)``, with eigenvalues of 1e-6 at the least.
        """
        d = vectors.shape[1]
        if self.count <= d + 1:
            return self.normalised(vectors)
        eigenvalues, basis = torch.linalg.eigh(self._scatter() / (self.count - d - 1))
        return self._centred(vectors) @ (basis * eigenvalues.clamp(min=_LEAST_EIGENVALUE).rsqrt()) @ basis.t()

    def _centred(self, vectors: Tensor) -> Tensor:
        return vectors.double() - self.state[f"{self.name}/mean"].double()

    def _scatter(self) -> Tensor:
        return self.state[f"{self.name}/scatter"].double()
