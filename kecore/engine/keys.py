"""Keys: what the value projections read at the subject's last token, in each context.

Only the tokens up to the lookup are run (a causal model cannot see later ones), only the layers up to the
last edited one, and each layer's keys continue from the kept hidden states below it instead of starting the
model anew, exactly as a full pass under the update made so far would give them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kecore.api.errors import NonFiniteError
from kecore.batch import RequestBatch
from kecore.memory import forward_bytes, pass_tokens
from kecore.model import ModelView
from kecore.model.sites import Key, Output, Site, Start, Value
from kecore.model.view import Pass
from kecore.statistics.triangular import cholesky_
from kecore.text import Rows

__all__ = ["KeyPass", "Keys", "Prompts"]

_PART = 8192  # keys that are widened to float64 at a time


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys of ``u`` groups at one layer.

    Args:
        rows: ``[r, d_in]`` float32, the key of each distinct text before and including the subject.
        weight: ``[u, r]``, how much each counts for a group; rows add up to 1. Sparse, as most rows are one group's.
    """

    rows: Tensor
    weight: Tensor

    def mean(self) -> Tensor:
        """One key a group, its mean over contexts: ``[d_in, u]``."""
        return (self.weight @ self.rows).t()

    def each(self, *, compact: bool = False) -> tuple[Tensor, Tensor]:
        """Every key as an equation of its own, scaled by the root of its weight.

        Args:
            compact: where there are more keys than ``d_in`` (thousands of facts), give ``d_in`` columns that stand for
                all of them, and belong to no group: least squares knows the columns ``K`` and shares ``S`` by ``K Kᵀ``
                and ``K S``, the groups' mean keys, and these agree in both.

        Returns:
            ``[d_in, c]`` columns and ``[c, u]`` shares: column ``j`` is to be mapped to the groups' residuals
            ``[d_out, u] @ shares[j]``, so that least squares over the columns is the weighted one over keys.
        """
        weight = self.weight.to_sparse().coalesce()
        (group, row), root = weight.indices(), weight.values().sqrt()
        columns = (self.rows[row] * root[:, None]).t()
        if not compact or columns.shape[1] <= columns.shape[0]:
            return columns, torch.zeros(len(root), len(weight)).index_put((torch.arange(len(root)), group), root)
        lower = _root(columns)
        return lower.float(), torch.linalg.solve_triangular(lower, self.mean().double(), upper=False).float()


class KeyPass:
    """One incremental pass through the edited layers.

    Call :meth:`advance` for each layer in ascending order, with the updates of the layers before it in
    place (``view.overlay``).

    Args:
        view: the model, frozen by the caller.
        batch: the edits; each group gets a key.
        contexts: prefixes of every prompt; the first is empty.
        layers: edited layers, ascending.
        memory: bytes of activations per chunk of rows.
        projection: measure what the last edited layer gives at its value projection, not at its output, where the
            layers below also have a part (PMET's targets).
        bare: weight of the bare prompt's key, the contexts sharing the rest; None counts it as one of them.
    """

    def __init__(
        self,
        view: ModelView,
        batch: RequestBatch,
        contexts: Sequence[str],
        layers: Sequence[int],
        memory: int = 2 << 30,
        bare: float | None = 0.5,
        projection: bool = False,
    ) -> None:
        self.view, self.layers = view, list(layers)
        self.scale = None if projection else view.layers[self.layers[-1]].residual_scale
        in_context = [batch.located(context) for context in contexts]
        # Requests that share subject and text before it have the same keys: each distinct row runs once.
        place: dict[tuple[int, ...], int] = {}
        index: list[tuple[int, int, int]] = []
        for request, group in enumerate(batch.groups):
            for context, located in enumerate(in_context):
                item = located[request]
                index.append((group, place.setdefault(item.ids[: item.lookup + 1], len(place)), context))
        rows = list(place)
        u, others = len(batch.subjects), len(contexts) - 1
        of_context = [1.0] if not others else [others * bare / (1 - bare) if bare is not None else 1.0] + [1.0] * others
        parts = [(group, row, of_context[context]) for group, row, context in index if of_context[context]]
        group, row = torch.tensor([part[:2] for part in parts]).t()
        weight = torch.tensor([part[2] for part in parts])
        weight /= torch.zeros(u).index_add(0, group, weight)[group]
        of = torch.stack([group, row])
        self.weight = torch.sparse_coo_tensor(of, weight, (u, len(rows)), check_invariants=True).coalesce()
        self.chunks: list[tuple[Tensor, Rows, Tensor | None]] = []
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        most = max(1, min(pass_tokens(view), memory // forward_bytes(view)))
        for chunk in _chunks(order, [len(row) for row in rows], most):
            ids = [rows[i] for i in chunk]
            padded = batch.encoder.rows(ids, [len(row) - 1 for row in ids]).to(view.device)
            self.chunks.append((torch.tensor(chunk), padded, None))
        self.below: int | None = None
        self.original = self._outputs(self.layers[-1])

    @torch.no_grad()
    def advance(self, layer: int) -> tuple[Keys, Tensor]:
        """Keys of ``layer`` under the updates in place, and what the last edited layer gives.

        Returns:
            Keys, and ``[u, d_model]``: the mean change of the last edited layer's output since the unedited
            model, in units of its value projection.
        """
        last = self.layers[-1]
        keys: list[Tensor] = []
        outputs: list[Tensor] = []
        for place, (index, rows, hidden) in enumerate(self.chunks):
            first = Start(self.below + 1, hidden) if self.below is not None and hidden is not None else None
            lowest = 0 if first is None else first.layer
            taps: list[Site] = [Key(layer), Output(last), Value(last)]
            if layer - 1 >= lowest:
                taps.append(Output(layer - 1))
            out = self.view.run(rows, taps=taps, first=first, last=last)
            self.chunks[place] = (index, rows, out.taps.get(Output(layer - 1), hidden))
            keys.append(_last(out[Key(layer)]))
            outputs.append(self._given(out))
        if layer:
            self.below = layer - 1
        moved = self.weight @ self._ordered(outputs) - self.original
        return Keys(self._ordered(keys), self.weight), moved

    def _outputs(self, last: int) -> Tensor:
        found: list[Tensor] = []
        with torch.no_grad():
            for _, rows, _ in self.chunks:
                out = self.view.run(rows, taps=[Output(last), Value(last)], last=last)
                found.append(self._given(out))
        return self.weight @ self._ordered(found)

    def _given(self, out: Pass) -> Tensor:
        """What the last edited layer gives at the lookup token, in units of its value projection."""
        last = self.layers[-1]
        return _last(out[Value(last)]) if self.scale is None else _last(out[Output(last)]) / self.scale

    def _ordered(self, parts: list[Tensor]) -> Tensor:
        """Rows of all chunks in their original order, on the CPU."""
        index = torch.cat([index for index, _, _ in self.chunks])
        rows = torch.cat(parts).cpu()
        return torch.empty_like(rows).index_copy_(0, index, rows)


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a batch in all contexts: what a pass over any layers is begun from.

    Args:
        view: the model, frozen by the caller.
        batch: the edits.
        contexts: prefixes of every prompt; the first is empty.
        memory: bytes of activations per chunk of rows.
        bare: weight of the bare prompt's key; see :class:`KeyPass`.
    """

    view: ModelView
    batch: RequestBatch
    contexts: Sequence[str]
    memory: int
    bare: float | None

    def begin_pass(self, layers: Sequence[int], *, projection: bool = False) -> KeyPass:
        """Begin a pass over some layers, ascending; what the last one gives now is measured at once.

        Args:
            layers: the layers.
            projection: measure at the last layer's value projection, not at its output.
        """
        return KeyPass(
            self.view,
            self.batch,
            self.contexts,
            layers,
            memory=self.memory,
            bare=self.bare,
            projection=projection,
        )


def _last(found: Tensor) -> Tensor:
    """The last token's, by themselves: a view would hold the memory of all tokens."""
    return found[:, -1].float().clone()


def _root(columns: Tensor) -> Tensor:
    """``L`` with ``L Lᵀ = K Kᵀ`` up to float64's rounding, which is added to make it definite."""
    total = torch.zeros(len(columns), len(columns), dtype=torch.float64)
    for part in columns.split(_PART, dim=1):
        wide = part.double()
        total.addmm_(wide, wide.t())
    size = float(total.trace())
    total.diagonal().add_(len(total) * torch.finfo(total.dtype).eps * size)
    lower = cholesky_(total)
    if lower is None:
        raise NonFiniteError("keys of the edits hold NaN or infinity; load the model in float32 or bfloat16")
    return lower


def _chunks(order: list[int], length: list[int], tokens: int) -> list[list[int]]:
    out: list[list[int]] = []
    for i in order:
        # Rows come by rising length, so the newest is the width of its chunk.
        if out and (len(out[-1]) + 1) * length[i] <= tokens and length[i] <= 1.25 * length[out[-1][0]] + 2:
            out[-1].append(i)
        else:
            out.append([i])
    return out
