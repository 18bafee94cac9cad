"""A fine-tuning gradient in factors, and passes in which each row has an update of its own.

The gradient of a linear map ``y = W x`` is a sum over tokens of outer products: ``Σ δ_t u_tᵀ`` with ``u`` the input
(the key) and ``δ`` the gradient with respect to the output (MEND, arXiv 2110.11309, section 3.1). Everything here is
batched over requests: rows do not see each other, so the factors of a request are those that it has alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kecore.api.errors import NonFiniteError
from kecore.model import LinearView, ModelView
from kecore.text import Encoded, Encoder, Rows

__all__ = ["Factors", "Reader", "Shifts", "Texts", "grouped", "low_rank", "means", "nll", "unit_step"]

Shifts = Mapping[int, tuple[Tensor, Tensor]]
"""Layer to ``(U [groups, k, d_out], V [groups, k, d_in])``: the update ``Σ_k U_k V_kᵀ`` of each group of requests."""


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """Gradients of the mean negative log-likelihood of targets, one request each.

    Args:
        inputs: layer to ``u``, ``[requests, tokens, d_in]`` float32; zero where a request has fewer tokens.
        deltas: layer to ``δ``, ``[requests, tokens, d_out]`` float32; zero there as well.
        mask: ``[requests, tokens]``, where there is a token.
        said: what the model itself finds most probable at each place of each request's target, as token ids.
    """

    inputs: Mapping[int, Tensor]
    deltas: Mapping[int, Tensor]
    mask: Tensor
    said: tuple[tuple[int, ...], ...]

    def one(self, index: int) -> Factors:
        """Those of one request, without padding."""
        keep = self.mask[index]
        return Factors(
            {layer: u[index, keep][None] for layer, u in self.inputs.items()},
            {layer: d[index, keep][None] for layer, d in self.deltas.items()},
            keep[keep][None],
            (self.said[index],),
        )

    @staticmethod
    def stack(parts: Sequence[Factors]) -> Factors:
        """Several requests' factors, padded to the longest."""
        width = max(part.mask.shape[1] for part in parts)

        def padded(x: Tensor) -> Tensor:
            return torch.cat([x, x.new_zeros(x.shape[0], width - x.shape[1], *x.shape[2:])], 1)

        return Factors(
            {layer: torch.cat([padded(part.inputs[layer]) for part in parts]) for layer in parts[0].inputs},
            {layer: torch.cat([padded(part.deltas[layer]) for part in parts]) for layer in parts[0].deltas},
            torch.cat([padded(part.mask) for part in parts]),
            tuple(said for part in parts for said in part.said),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Prompts with continuations as token rows, and the hidden states below the first edited layer.

    Args:
        rows: aligned at their first token.
        below: ``[rows, width, d_model]``; None where the first layer is edited.
        row: ``[places]``: row of each predicted token.
        column: ``[places]``: column that predicts it.
        token: ``[places]``: its id.
    """

    rows: Rows
    below: Tensor | None
    row: Tensor
    column: Tensor
    token: Tensor

    @property
    def count(self) -> int:
        """Rows."""
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
        """What enters the first edited layer, ``[tokens, d_model]`` a text; empty where that is the model's first."""
        first = self.layers[0] - 1
        if first < 0:
            return []
        ids = [item.ids[:-1] for item in items]
        with torch.no_grad():
            found = self.view.forward(self._rows(ids), stop=first, hidden=[first]).hidden[first]
        # Copies, or one text would hold the memory of all.
        return [state[: len(row)].clone() for row, state in zip(ids, found, strict=True)]

    def texts(self, items: Sequence[Encoded], states: Sequence[Tensor] | None = None) -> Texts:
        """Token rows, ready to be run. A continuation's last token is predicted and never read.

        Args:
            items: prompts with continuations.
            states: their :meth:`states`, where they are at hand.
        """
        rows = self._rows([item.ids[:-1] for item in items])
        places = [(i, j - 1, item.ids[j]) for i, item in enumerate(items) for j in range(item.start, len(item.ids))]
        row, column, token = torch.tensor(places, device=self.view.device).t()
        states = self.states(items) if states is None else states
        # The lists of states are empty where no layer is below.
        below = torch.nn.utils.rnn.pad_sequence(list(states), batch_first=True) if states else None
        return Texts(rows, below, row, column, token)

    def _rows(self, ids: Sequence[tuple[int, ...]]) -> Rows:
        return self.encoder.rows(ids).to(self.view.device)

    def logits(self, texts: Texts, shifts: Shifts | None = None, group: Tensor | None = None) -> Tensor:
        """Logits at the predicted places, ``[places, vocab]`` float32.

        Args:
            texts: the rows.
            shifts: updates of the value projections, differentiable.
            group: ``[rows]``: which group's update each row has.
        """
        add = {layer: _Added(u, v, group) for layer, (u, v) in (shifts or {}).items() if group is not None}
        out = self.view.forward(texts.rows, resume=self._resume(texts), at=(texts.row, texts.column), add=add)
        return out.logits.float()  # type: ignore[union-attr]

    def factors(self, texts: Texts) -> Factors:
        """Gradient factors of each row as a request of its own, from one backward pass.

        Raises:
            NonFiniteError: a gradient is not finite.
        """
        projections = {layer: self.view.layers[layer].value_projection for layer in self.layers}
        shape = texts.rows.input_ids.shape
        # The gradient with respect to an output is that of a zero added to it.
        zeros = {
            layer: torch.zeros(*shape, p.d_out, dtype=p.weight.dtype, device=p.weight.device, requires_grad=True)
            for layer, p in projections.items()
        }
        with torch.enable_grad():
            out = self.view.forward(
                texts.rows,
                resume=self._resume(texts),
                keys=self.layers,
                change={layer: lambda output, zero=zero: output + zero for layer, zero in zeros.items()},
                at=(texts.row, texts.column),
            )
            # The sum over rows of each one's mean: no row's gradient depends on another's.
            logits = out.logits.float()  # type: ignore[union-attr]
            loss = means(nll(logits, texts), texts).sum()
            deltas = torch.autograd.grad(loss, list(zeros.values()))
        mask = texts.rows.attention_mask.bool()
        keep = mask[..., None]
        if not all(bool(torch.isfinite(delta).all()) for delta in deltas):
            raise NonFiniteError("a gradient is NaN or infinite; load the model in float32 or bfloat16")
        return Factors(
            {layer: out.keys[layer].float() * keep for layer in self.layers},
            {layer: delta.float() * keep for layer, delta in zip(self.layers, deltas, strict=True)},
            mask,
            tuple(tuple(logits.argmax(-1)[texts.row == i].tolist()) for i in range(texts.count)),
        )

    def _resume(self, texts: Texts) -> tuple[int, Tensor] | None:
        return None if texts.below is None else (self.layers[0], texts.below)


class _Added:
    """What the updates of its row's group add to the output of a value projection."""

    def __init__(self, u: Tensor, v: Tensor, group: Tensor) -> None:
        self.u, self.v = u[group], v[group]

    def __call__(self, x: Tensor) -> Tensor:
        return (x.to(self.v.dtype) @ self.v.transpose(1, 2)) @ self.u


def nll(logits: Tensor, texts: Texts) -> Tensor:
    """Negative log-likelihood of each predicted token, ``[places]``."""
    return torch.nn.functional.cross_entropy(logits, texts.token.to(logits.device), reduction="none")


def means(values: Tensor, texts: Texts) -> Tensor:
    """Mean over each row's places, ``[rows]``."""
    row = texts.row.to(values.device)
    total = values.new_zeros(texts.count).index_add(0, row, values)
    return total / torch.bincount(row, minlength=texts.count)


def grouped(u: Tensor, v: Tensor, together: int) -> tuple[Tensor, Tensor]:
    """``[requests, tokens, ...]`` as ``[groups, together · tokens, ...]``, both of them."""

    def one(x: Tensor) -> Tensor:
        return x.reshape(-1, together * x.shape[1], x.shape[2])

    return one(u), one(v)


def low_rank(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``U [k, d_out]`` and ``V [k, d_in]`` as the columns of a :class:`~kecore.edit.LowRank`.

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
    """Root mean square of an update of rank one that moves a key it fits as far as the matrix itself moves any.

    A key of norm 1 is mapped by ``W`` to about ``‖W‖ / sqrt(d_in)``, and by an update of rank one to its whole norm.
    """
    return float(projection.weight.float().square().mean().sqrt()) * projection.d_in**-0.5
