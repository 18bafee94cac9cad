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
from kecore.model import ModelView, Routing, SiteId
from kecore.model.sites import Key, Output, Routed, Site, Start, Value
from kecore.model.view import Pass
from kecore.statistics.triangular import cholesky_
from kecore.text import Encoder, Rows

__all__ = ["KeyPass", "Keys", "Prompts", "RoutedKeys", "SiteKeys", "expert_shares"]

_TOGETHER = 512  # rows whose experts are asked for their keys at a time
_LEAST_DIRECTION = 1e-6  # of the largest: experts that hardly count decide nothing
_CHUNK = 8192  # keys that are widened to float64 at a time


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
        """Return one key a group, its mean over contexts: ``[d_in, u]``."""
        return (self.weight @ self.rows).t()

    @property
    def group_count(self) -> int:
        """How many groups have a key here; all of them in a dense layer."""
        return len(self.weight.to_sparse().coalesce().indices()[0].unique())

    def sites(self, layer: int) -> list[SiteKeys]:
        """Return the keys of each site of the layer that is to be written, with its part of the layer's residual."""
        return [SiteKeys(SiteId(layer), self, torch.ones(len(self.weight)))]

    def at(self, _site: SiteId) -> Keys:
        """Return the keys at one site of the layer: all of them, in a dense layer."""
        return self

    def each(self, *, compact: bool = False) -> tuple[Tensor, Tensor]:
        """Return every key as an equation of its own, scaled by the root of its weight.

        Args:
            compact: where there are more keys than ``d_in`` (thousands of facts), give ``d_in`` columns that stand for
                all of them, and belong to no group: least squares knows the columns ``K`` and shares ``S`` by ``K Kᵀ``
                and ``K S``, the groups' mean keys, and these agree in both.

        Returns:
            ``[d_in, c]`` columns and ``[c, u]`` shares: column ``j`` is to be mapped to the groups' residuals
            ``[d_out, u] @ shares[j]``, so that least squares over the columns is the weighted one over keys.
        """
        weight = self.weight.to_sparse().coalesce()
        group, row = weight.indices()  # [c] each: one column for each pair of a group and a row that counts for it
        root = weight.values().sqrt()  # [c]
        columns = (self.rows[row] * root[:, None]).t()  # [d_in, c]
        if not compact or columns.shape[1] <= columns.shape[0]:
            shares = torch.zeros(len(root), len(weight)).index_put((torch.arange(len(root)), group), root)  # [c, u]
            return columns, shares
        lower = _root(columns)  # [d_in, d_in]
        return lower.float(), torch.linalg.solve_triangular(lower, self.mean().double(), upper=False).float()


@dataclass(frozen=True, slots=True)
class SiteKeys:
    """Keys at one site, and how much of what the layer is to write is written there.

    Args:
        site: the site.
        keys: of the same ``u`` groups as the layer's; those that do not use an expert have no key there.
        share: ``[u]``, part of each group's residual. Over the sites that a row uses, the parts add up to 1.
    """

    site: SiteId
    keys: Keys
    share: Tensor


@dataclass(frozen=True, slots=True)
class RoutedKeys(Keys):
    """Keys of ``u`` groups at a layer with experts.

    Args:
        rows: ``[r, d]`` float32, what the experts read.
        weight: ``[u, r]``, as in a dense layer.
        experts: ``[r, k]``, the experts that each row is routed to.
        expert_keys: ``[r, k, d_in]`` float32, the weighted keys there; see :mod:`kecore.model.experts`.
        routing_weights: ``[r, k]`` float32, how much of each expert's output counts.
    """

    experts: Tensor
    expert_keys: Tensor
    routing_weights: Tensor

    def sites(self, layer: int) -> list[SiteKeys]:
        """Return the keys of each expert that some row is routed to, with its part of the residual."""
        weight = self.weight.to_dense()  # [u, r]
        used = self.experts[self.routing_weights != 0].unique().tolist()
        size = torch.zeros(len(self.experts), len(used), dtype=torch.float64)  # [r, experts], 0 where it is not used
        for column, expert in enumerate(used):
            is_here = self.experts == expert  # [r, k]
            size[:, column] = (self.routing_weights.double() * is_here).sum(1).square()
        shares = torch.stack([expert_shares(row_weights, size) for row_weights in weight])  # [u, experts]
        sites: list[SiteKeys] = []
        for column, expert in enumerate(used):
            site = SiteId(layer, expert)
            sites.append(SiteKeys(site, self.at(site), shares[:, column].float()))
        return sites

    def at(self, site: SiteId) -> Keys:
        """Return the keys at one expert; each group's weights add up to 1 over the rows that are routed there."""
        row, slot = ((self.experts == site.expert) & (self.routing_weights != 0)).nonzero(as_tuple=True)  # [n] each
        weight = self.weight.to_dense()[:, row]  # [u, n]
        total = weight.sum(1, keepdim=True)  # [u, 1], 0 for groups that have no row here
        weight = torch.where(total > 0, weight / total.clamp(min=torch.finfo(weight.dtype).tiny), 0)
        return Keys(self.expert_keys[row, slot], weight.to_sparse())


def expert_shares(row_weights: Tensor, size: Tensor) -> Tensor:
    """Share one group's residual among experts, so that every row receives all of it.

    Of all ways to do so it is the one that changes what the experts return least (in the sum of squares). A row that
    uses experts with routing weights ``w`` gives ``w_e² / Σ w²`` to each; where a group's rows use different experts,
    the parts of each row's experts add up to 1 as nearly as they can.

    Args:
        row_weights: ``[r]``, how much each row counts for the group.
        size: ``[r, e]`` float64, squared routing weight of each row at each expert; 0 where it is not routed there.

    Returns:
        ``[e]`` float64.
    """
    counted = row_weights > 0
    root_weight = row_weights[counted].double().sqrt()  # [n]
    mass = (root_weight.square()[:, None] * size[counted]).sum(0).sqrt()  # [e]
    system = root_weight[:, None] * (size[counted] > 0) * mass  # [n, e]
    return mass * (torch.linalg.pinv(system, rtol=_LEAST_DIRECTION) @ root_weight)


@dataclass(frozen=True, slots=True)
class Occurrence:
    """A request in a context, whose key is that of a row.

    Args:
        group: the request's group.
        context: index of the context.
        row: index of the row among the distinct ones.
    """

    group: int
    context: int
    row: int


@dataclass(slots=True)
class Chunk:
    """Rows that are run together.

    Args:
        index: ``[n]``, their places among all distinct rows.
        rows: their tokens, which all end in the last column, with the subject.
        hidden: ``[n, width, d_model]``, output of the layer below the one that comes next; None before the first.
    """

    index: Tensor
    rows: Rows
    hidden: Tensor | None = None


class KeyPass:
    """One incremental pass through the edited layers; :meth:`Prompts.begin_pass` begins it.

    Call :meth:`advance` for each layer in ascending order, with the updates of the layers before it in
    place (``view.overlay``).

    Args:
        view: the model, frozen by the caller.
        layers: edited layers, ascending.
        weight: ``[u, rows]`` sparse, how much each row's key counts for a group.
        output_weight: ``[u, rows]`` sparse, how much each row counts where outputs are measured.
        chunks: the rows.
        projection: measure what the last edited layer gives at its value projection, not at its output, where the
            layers below also have a part (PMET's targets).
    """

    def __init__(
        self,
        view: ModelView,
        layers: Sequence[int],
        *,
        weight: Tensor,
        output_weight: Tensor,
        chunks: list[Chunk],
        projection: bool,
    ) -> None:
        self.view, self.layers, self.chunks = view, list(layers), chunks
        self.weight, self.output_weight = weight, output_weight
        self.scale = None if projection else view.layers[self.layers[-1]].residual_scale
        self.below: int | None = None  # the layer whose output the chunks hold

    def start(self) -> None:
        """Measure what the last edited layer gives now, ``[u, d_model]``, before any update is in place."""
        self.original = self._outputs(self.layers[-1])

    @torch.no_grad()
    def advance(self, layer: int) -> tuple[Keys, Tensor]:
        """Return the keys of ``layer`` under the updates in place, and what the last edited layer gives.

        Returns:
            Keys, and ``[u, d_model]``: the mean change of the last edited layer's output since the unedited
            model, in units of its value projection.
        """
        last = self.layers[-1]
        key_sites: list[Site] = [Key(layer)]
        if self.view.layers[layer].experts is not None:
            key_sites = [Routed(layer, "states"), Routed(layer, "experts"), Routed(layer, "weights")]
        key_parts: dict[Site, list[Tensor]] = {site: [] for site in key_sites}
        outputs: list[Tensor] = []
        for chunk in self.chunks:
            first = None
            if self.below is not None and chunk.hidden is not None:
                first = Start(self.below + 1, chunk.hidden)
            lowest = 0 if first is None else first.layer
            taps: list[Site] = [*key_sites, Output(last), Value(last)]
            if layer - 1 >= lowest:
                taps.append(Output(layer - 1))
            out = self.view.run(chunk.rows, taps=taps, first=first, last=last)
            chunk.hidden = out.taps.get(Output(layer - 1), chunk.hidden)
            for site in key_sites:
                key_parts[site].append(_last_token(out[site]))
            outputs.append(self._output_at_lookup(out))
        if layer:
            self.below = layer - 1
        moved = self.output_weight @ self._in_order(outputs) - self.original  # [u, d_model]
        return self._keys(layer, [self._in_order(key_parts[site]) for site in key_sites]), moved

    def _keys(self, layer: int, rows: list[Tensor]) -> Keys:
        """Return a layer's keys from what was read there: the keys themselves, or the routing to its experts."""
        if len(rows) == 1:
            return Keys(rows[0], self.weight)
        states, experts, weights = rows
        view_experts = self.view.experts(layer)
        device = view_experts.parameter.device
        routing = Routing(states.to(device, self.view.dtype), experts.long().to(device), weights.to(device))
        keys: list[Tensor] = []
        for index in torch.arange(len(states), device=device).split(_TOGETHER):
            keys.append(view_experts.keys(routing.at(index)).cpu())
        scaled_weights = view_experts.scale * weights
        return RoutedKeys(
            states, self.weight, experts=experts.long(), expert_keys=torch.cat(keys), routing_weights=scaled_weights
        )

    def _outputs(self, last: int) -> Tensor:
        """Return what a layer gives now, ``[u, d_model]``."""
        outputs: list[Tensor] = []
        with torch.no_grad():
            for chunk in self.chunks:
                out = self.view.run(chunk.rows, taps=[Output(last), Value(last)], last=last)
                outputs.append(self._output_at_lookup(out))
        return self.output_weight @ self._in_order(outputs)  # [u, d_model]

    def _output_at_lookup(self, out: Pass) -> Tensor:
        """Return what the last edited layer gives at the lookup token, in units of its value projection."""
        last = self.layers[-1]
        if self.scale is None:
            return _last_token(out[Value(last)])
        return _last_token(out[Output(last)]) / self.scale

    def _in_order(self, of_chunks: list[Tensor]) -> Tensor:
        """Return the rows of all chunks in the order of the distinct rows, on the CPU."""
        index = torch.cat([chunk.index for chunk in self.chunks])  # [rows]
        rows = torch.cat(of_chunks).cpu()  # [rows, d]
        return torch.empty_like(rows).index_copy_(0, index, rows)


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a batch in all contexts, from which passes over layers are begun.

    Args:
        view: the model, frozen by the caller.
        batch: the edits; each group gets a key.
        contexts: prefixes of every prompt; the first is empty.
        memory: bytes of activations per chunk of rows.
        bare: share of the bare prompt's key in the weight of all contexts; None counts it as one of them.
        bare_outputs: outputs are measured on the bare prompts alone (MEMIT's released code), and not on the mean of
            all contexts.
    """

    view: ModelView
    batch: RequestBatch
    contexts: Sequence[str]
    memory: int = 2 << 30
    bare: float | None = 0.5
    bare_outputs: bool = False

    def begin_pass(self, layers: Sequence[int], *, projection: bool = False) -> KeyPass:
        """Begin a pass over some layers, ascending; what the last one gives now is measured at once.

        Args:
            layers: the layers.
            projection: measure at the last layer's value projection, not at its output.
        """
        rows, occurrences = distinct_rows(self.batch, self.contexts)
        weights = context_weights(len(self.contexts) - 1, self.bare)
        counts = {"groups": len(self.batch.subjects), "rows": len(rows)}
        weight = group_weights(occurrences, weights, **counts)
        output_weight = weight
        if self.bare_outputs:
            output_weight = group_weights(occurrences, [1.0] + [0.0] * (len(weights) - 1), **counts)
        tokens = max(1, min(pass_tokens(self.view), self.memory // forward_bytes(self.view)))
        chunks = pack(self.view, self.batch.encoder, rows, tokens)
        key_pass = KeyPass(
            self.view, layers, weight=weight, output_weight=output_weight, chunks=chunks, projection=projection
        )
        key_pass.start()
        return key_pass


def context_weights(prefixes: int, bare_share: float | None) -> list[float]:
    """Return the weight of each context's key: the bare prompt first, then the prefixes, which weigh 1 each.

    Args:
        prefixes: number of prefixes.
        bare_share: share of the bare prompt in the sum of all; None counts it as one of the prefixes.
    """
    if prefixes == 0 or bare_share is None:
        return [1.0] * (1 + prefixes)
    bare_weight = prefixes * bare_share / (1 - bare_share)
    return [bare_weight] + [1.0] * prefixes


def distinct_rows(batch: RequestBatch, contexts: Sequence[str]) -> tuple[list[tuple[int, ...]], list[Occurrence]]:
    """Return the distinct token rows that end with a subject, and where each request in each context finds its own.

    Requests that share subject and text before it have the same keys, so each distinct row runs once.
    """
    in_context = [batch.located(context) for context in contexts]
    row_of_ids: dict[tuple[int, ...], int] = {}
    occurrences: list[Occurrence] = []
    for request, group in enumerate(batch.groups):
        for context, located in enumerate(in_context):
            up_to_lookup = located[request].ids[: located[request].lookup + 1]
            row = row_of_ids.setdefault(up_to_lookup, len(row_of_ids))
            occurrences.append(Occurrence(group, context, row))
    return list(row_of_ids), occurrences


def group_weights(occurrences: Sequence[Occurrence], weights: Sequence[float], *, groups: int, rows: int) -> Tensor:
    """Return how much each row counts for each group, ``[groups, rows]`` sparse; a group's weights add up to 1.

    Args:
        occurrences: requests in contexts.
        weights: weight of each context.
        groups: number of groups.
        rows: number of rows.
    """
    counted = [occurrence for occurrence in occurrences if weights[occurrence.context]]
    group = torch.tensor([occurrence.group for occurrence in counted])
    row = torch.tensor([occurrence.row for occurrence in counted])
    weight = torch.tensor([weights[occurrence.context] for occurrence in counted])
    weight /= torch.zeros(groups).index_add(0, group, weight)[group]  # each by the sum of its group's
    indices = torch.stack([group, row])  # [2, occurrences]
    return torch.sparse_coo_tensor(indices, weight, (groups, rows), check_invariants=True).coalesce()


def pack(view: ModelView, encoder: Encoder, rows: Sequence[Sequence[int]], tokens: int) -> list[Chunk]:
    """Put rows of similar length together.

    Args:
        view: the model whose device they go to.
        encoder: for padding.
        rows: token rows.
        tokens: most padded tokens of a chunk; a longer row is a chunk of its own.
    """
    lengths = [len(row) for row in rows]
    shortest_first = sorted(range(len(rows)), key=lambda row: lengths[row])
    chunks: list[Chunk] = []
    for members in _chunk_members(shortest_first, lengths, tokens):
        ids = [rows[row] for row in members]
        last_columns = [len(row) - 1 for row in ids]
        chunks.append(Chunk(torch.tensor(members), encoder.rows(ids, last_columns).to(view.device)))
    return chunks


def _last_token(states: Tensor) -> Tensor:
    """Return a copy of the last token's states, ``[n, d]``: a view would hold the memory of all tokens."""
    return states[:, -1].float().clone()


def _root(columns: Tensor) -> Tensor:
    """Return ``L`` with ``L Lᵀ = K Kᵀ`` up to float64's rounding, which is added to make it definite."""
    total = torch.zeros(len(columns), len(columns), dtype=torch.float64)
    for chunk in columns.split(_CHUNK, dim=1):
        wide = chunk.double()
        total.addmm_(wide, wide.t())
    total.diagonal().add_(len(total) * torch.finfo(total.dtype).eps * float(total.trace()))
    lower = cholesky_(total)
    if lower is None:
        raise NonFiniteError("keys of the edits hold NaN or infinity; load the model in float32 or bfloat16")
    return lower


def _chunk_members(shortest_first: list[int], lengths: list[int], tokens: int) -> list[list[int]]:
    """Choose the rows of each chunk, with no more padded tokens than allowed and little padding."""
    chunks: list[list[int]] = []
    for row in shortest_first:
        width = lengths[row]  # rows come by rising length, so the newest is the width of its chunk
        if chunks:
            fits = (len(chunks[-1]) + 1) * width <= tokens
            alike = width <= 1.25 * lengths[chunks[-1][0]] + 2
            if fits and alike:
                chunks[-1].append(row)
                continue
        chunks.append([row])
    return chunks
