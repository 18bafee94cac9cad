"""A fine-tuning gradient in factors, and passes in which each row has an update of its own.

The gradient of a linear map ``y = W x`` is a sum over tokens of outer products: ``Σ δ_t u_tᵀ`` with ``u`` the input
(the key) and ``δ`` the gradient with respect to the output (MEND, arXiv 2110.11309, section 3.1). Everything here is
batched over requests: rows do not see each other, so the factors of a request are those that it has alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from kecore.api.errors import NonFiniteError
from kecore.model import LinearView, ModelView
from kecore.model.sites import Beside, Key, Output, Patch, Site, Start, Value
from kecore.text import Encoded, Encoder, Rows

__all__ = ["Factors", "Reader", "Shifts", "Texts", "group_requests", "low_rank", "nll", "row_means", "unit_step"]

Shifts = Mapping[int, tuple[Tensor, Tensor]]
"""Layer to ``(U [groups, k, d_out], V [groups, k, d_in])``: the update ``Σ_k U_k V_kᵀ`` of each group of requests."""


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """Gradients of the mean negative log-likelihood of targets, one request each.

    Args:
        inputs: layer to ``u``, ``[requests, tokens, d_in]`` float32; zero where a request has fewer tokens.
        deltas: layer to ``δ``, ``[requests, tokens, d_out]`` float32; zero there as well.
        mask: ``[requests, tokens]``, where there is a token.
        answers: the tokens that the model itself finds most probable, where each token of a request's target stands.
    """

    inputs: Mapping[int, Tensor]
    deltas: Mapping[int, Tensor]
    mask: Tensor
    answers: tuple[tuple[int, ...], ...]

    def with_gradient(self, layer: int) -> Tensor:
        """Return ``[requests, tokens]``, true for the tokens whose gradient at a layer is not zero.

        In the last edited layers these are few: a token in front of the target reaches its loss by attention alone.
        """
        return self.mask & (self.deltas[layer] != 0).any(-1)

    def one(self, index: int) -> Factors:
        """Return the factors of one request, without padding."""
        real = self.mask[index]  # [tokens]
        return Factors(
            inputs={layer: u[index, real][None] for layer, u in self.inputs.items()},
            deltas={layer: delta[index, real][None] for layer, delta in self.deltas.items()},
            mask=real[real][None],
            answers=(self.answers[index],),
        )

    @staticmethod
    def stack(chunks: Sequence[Factors]) -> Factors:
        """Return the factors of all chunks of requests as one, padded to the longest."""
        width = max(chunk.mask.shape[1] for chunk in chunks)

        def pad(x: Tensor) -> Tensor:
            """Return ``[requests, tokens, ...]`` with ``width`` tokens."""
            return torch.cat([x, x.new_zeros(len(x), width - x.shape[1], *x.shape[2:])], 1)

        inputs: dict[int, Tensor] = {}
        deltas: dict[int, Tensor] = {}
        for layer in chunks[0].inputs:
            inputs[layer] = torch.cat([pad(chunk.inputs[layer]) for chunk in chunks])
            deltas[layer] = torch.cat([pad(chunk.deltas[layer]) for chunk in chunks])
        mask = torch.cat([pad(chunk.mask) for chunk in chunks])
        answers = tuple(chain.from_iterable(chunk.answers for chunk in chunks))
        return Factors(inputs, deltas, mask, answers)


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Prompts with continuations as token rows, and the hidden states below the first edited layer.

    Args:
        rows: aligned at their first token.
        below: ``[rows, width, d_model]``; None where the first layer is edited.
        row: ``[targets]``: row of each predicted token.
        column: ``[targets]``: column that predicts it.
        token: ``[targets]``: its id.
    """

    rows: Rows
    below: Tensor | None
    row: Tensor
    column: Tensor
    token: Tensor

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self.rows.input_ids)


@dataclass(frozen=True)
class Reader:
    """Runs one model from the first edited layer on.

    Args:
        view: the model, frozen by the caller.
        encoder: its tokenizer.
        layers: edited layers, ascending.
    """

    view: ModelView
    encoder: Encoder
    layers: Sequence[int]

    def states(self, items: Sequence[Encoded]) -> list[Tensor]:
        """Return what enters the first edited layer, ``[tokens, d_model]`` for each text.

        The list is empty where the first edited layer is the model's first.
        """
        first = self.layers[0] - 1
        if first < 0:
            return []
        ids = [item.ids[:-1] for item in items]
        with torch.no_grad():
            below = self.view.run(self._rows(ids), taps=[Output(first)], last=first)[Output(first)]
        # Copies, or one text would hold the memory of all.
        return [state[: len(row)].clone() for row, state in zip(ids, below, strict=True)]

    def texts(self, items: Sequence[Encoded], states: Sequence[Tensor] | None = None) -> Texts:
        """Return token rows, ready to be run. A continuation's last token is predicted and never read.

        Args:
            items: prompts with continuations.
            states: their :meth:`states`, where they are at hand.
        """
        rows = self._rows([item.ids[:-1] for item in items])
        targets: list[tuple[int, int, int]] = []  # row, column and id of each predicted token
        for index, item in enumerate(items):
            targets += [(index, j - 1, item.ids[j]) for j in range(item.start, len(item.ids))]
        row, column, token = torch.tensor(targets, device=self.view.device).t()
        if states is None:
            states = self.states(items)
        below = None
        if states:  # empty where no layer is below
            below = torch.nn.utils.rnn.pad_sequence(list(states), batch_first=True)  # [rows, width, d_model]
        return Texts(rows, below, row, column, token)

    def _rows(self, ids: Sequence[tuple[int, ...]]) -> Rows:
        return self.encoder.rows(ids).to(self.view.device)

    def logits(self, texts: Texts, shifts: Shifts | None = None, group: Tensor | None = None) -> Tensor:
        """Return the logits of the predicted tokens, ``[targets, vocab]`` float32.

        Args:
            texts: the rows.
            shifts: updates of the value projections, differentiable; needs ``group``.
            group: ``[rows]``: which group's update each row has.
        """
        patches: dict[Site, Patch] = {}
        if shifts is not None and group is not None:
            patches = {Value(layer): Beside(_RowUpdate(u, v, group)) for layer, (u, v) in shifts.items()}
        at = texts.row, texts.column
        return self.view.run(texts.rows, patches=patches, first=self._start(texts), at=at).logits.float()

    def factors(self, texts: Texts) -> Factors:
        """Return the gradient factors of each row as a request of its own, from one backward pass.

        Raises:
            NonFiniteError: a gradient is not finite.
        """
        # The gradient with respect to an output is that of a zero added to it.
        zeros = {layer: self._zero_output(layer, texts.rows) for layer in self.layers}
        with torch.enable_grad():
            out = self.view.run(
                texts.rows,
                taps=map(Key, self.layers),
                patches={Value(layer): zero.add for layer, zero in zeros.items()},
                first=self._start(texts),
                at=(texts.row, texts.column),
            )
            # The sum over rows of each one's mean: no row's gradient depends on another's.
            logits = out.logits.float()
            loss = row_means(nll(logits, texts), texts).sum()
            gradients = torch.autograd.grad(loss, list(zeros.values()))
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            raise NonFiniteError("a gradient is NaN or infinite; load the model in float32 or bfloat16")
        mask = self.view.tokens_read(texts.rows)
        deltas = dict(zip(self.layers, gradients, strict=True))
        likeliest = logits.argmax(-1)  # [targets]
        answers: list[tuple[int, ...]] = []
        for index in range(texts.count):
            answers.append(tuple(likeliest[texts.row == index].tolist()))
        return Factors(
            inputs={layer: out[Key(layer)].float() * mask[..., None] for layer in self.layers},
            deltas={layer: delta.float() * mask[..., None] for layer, delta in deltas.items()},
            mask=mask,
            answers=tuple(answers),
        )

    def _zero_output(self, layer: int, rows: Rows) -> Tensor:
        """Return zeros to be added to a value projection's output, ``[rows, width, d_out]``, that take a gradient."""
        projection = self.view.layers[layer].site.linear
        weight = projection.weight
        shape = (*rows.input_ids.shape, projection.d_out)
        return torch.zeros(shape, dtype=weight.dtype, device=weight.device, requires_grad=True)

    def _start(self, texts: Texts) -> Start | None:
        if texts.below is None:
            return None
        return Start(self.layers[0], texts.below)


class _RowUpdate:
    """A map that adds to a value projection's output what the update of its row's group gives.

    Args:
        u: ``[groups, k, d_out]``.
        v: ``[groups, k, d_in]``.
        group: ``[rows]``.
    """

    def __init__(self, u: Tensor, v: Tensor, group: Tensor) -> None:
        self.u, self.v = u[group], v[group]

    def __call__(self, keys: Tensor) -> Tensor:
        """Return ``[rows, width, d_out]`` for keys ``[rows, width, d_in]``."""
        return (keys.to(self.v.dtype) @ self.v.transpose(1, 2)) @ self.u


def nll(logits: Tensor, texts: Texts) -> Tensor:
    """Return the negative log-likelihood of each predicted token, ``[targets]``."""
    return torch.nn.functional.cross_entropy(logits, texts.token.to(logits.device), reduction="none")


def row_means(values: Tensor, texts: Texts) -> Tensor:
    """Return the mean of ``[targets]`` values over each row, ``[rows]``."""
    row = texts.row.to(values.device)
    total = values.new_zeros(texts.count).index_add(0, row, values)
    return total / torch.bincount(row, minlength=texts.count)


def group_requests(u: Tensor, v: Tensor, together: int) -> tuple[Tensor, Tensor]:
    """Return ``[requests, tokens, d]`` factors as ``[groups, together · tokens, d]``, one group an update."""
    grouped_u = u.reshape(-1, together * u.shape[1], u.shape[2])
    grouped_v = v.reshape(-1, together * v.shape[1], v.shape[2])
    return grouped_u, grouped_v


def low_rank(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``U [k, d_out]`` and ``V [k, d_in]`` as the columns of a :class:`~kecore.edit.LowRank`.

    Where there are more of them than the matrix has rows or columns, the product itself beside an identity takes
    less room and is the same update.
    """
    k, d_out, d_in = len(u), u.shape[1], v.shape[1]
    if k <= min(d_out, d_in):
        return u.t().contiguous(), v.t().contiguous()
    if d_out <= d_in:
        return torch.eye(d_out), v.t() @ u
    return u.t() @ v, torch.eye(d_in)


def unit_step(projection: LinearView) -> float:
    """Return the root mean square of an update of rank one that moves its own key as far as the matrix moves any.

    A key of norm 1 is mapped by ``W`` to about ``‖W‖ / sqrt(d_in)``, and by an update of rank one to its whole norm.
    """
    return float(projection.weight.float().square().mean().sqrt()) * projection.d_in**-0.5
