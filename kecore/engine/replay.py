"""Running a model over and over with another vector at one token: only what can change is computed.

A vector added at layer ``L`` in column ``c`` cannot reach layers below ``L`` nor columns left of ``c``. So the
layers up to ``L`` are skipped (their output is kept), and tokens left of ``c`` live on as a read-only
key-value cache, in which what many rows begin with (a context before the prompts of many facts) has been run once.
``docs/concepts.md`` draws such rows, laid out: padding, context, prefix, subject, lookup, target.
All of it is the architecture's own: the model's ``forward`` runs each time. A first run is
compared with the full forward pass; a model that cannot be driven this way falls back, and says why.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kecore.api.errors import KecoreWarning
from kecore.inference.opening import common_prefix
from kecore.model import ModelView
from kecore.model.sites import ModuleOutput, Output, Patch, Site, Start, Value
from kecore.model.verify import difference, rounding
from kecore.text import Encoder, Rows

__all__ = ["Replay"]


class Replay:
    """Token rows that are run again and again with a changing vector at their lookup token.

    Args:
        view: the model, frozen by the caller.
        encoder: for padding.
        ids: token rows.
        lookups: index of the lookup token in each row.
        layer: layer whose value projection's output is changed.
        mode: how to drive the model, where that is known; None to find out for these rows.
        mixer: a module whose output is changed as well (:func:`kecore.model.mixer.mixer`); the vectors are then
            two, one behind the other.
        opening: for each row the index of the text that it may begin with.

    Attributes:
        mode: ``"shared"`` (upper layers, tokens from the lookup on, openings run once for all rows), ``"cached"``
            (the same, each row run by itself), ``"upper"`` (upper layers, all tokens) or ``"full"``.
    """

    def __init__(
        self,
        view: ModelView,
        encoder: Encoder,
        ids: Sequence[Sequence[int]],
        lookups: Sequence[int],
        layer: int,
        mode: str | None = None,
        mixer: nn.Module | None = None,
        opening: Sequence[int] | None = None,
    ) -> None:
        self.view, self.layer, self.mixer = view, layer, mixer
        self.rows = encoder.rows(ids, lookups).to(view.device)
        self.column = max(lookups)  # the lookup tokens of all rows stand in one column
        self.lookups = torch.tensor(lookups, device=view.device)
        ids_before_lookup = [row[:lookup] for row, lookup in zip(ids, lookups, strict=True)]
        self._preceding = _PrecedingTokens(view, encoder, ids_before_lookup, opening)
        self.past: tuple[Any, Tensor] | None = None  # cache of the columns before `rows`, and the mask of all columns
        self.hidden: Tensor | None = None  # [rows, width, d_model], what the lowest layer that runs again reads
        self.mode = mode or "full"
        if mode is None:
            self._find_mode()
        elif mode != "full":
            with torch.no_grad():
                self._set_up(self.rows, mode)

    @property
    def parts(self) -> int:
        """How many vectors are added to a row."""
        return 1 if self.mixer is None else 2

    @property
    def _scale(self) -> float | None:
        """What the hidden state behind the layer gains by a vector, in units of it; None where that is not linear."""
        if self.mixer is not None:
            # What is added before the feed-forward block changes what that reads, so the layer itself has to run.
            return None
        return self.view.layers[self.layer].residual_scale

    @property
    def _first_layer(self) -> int:
        """The lowest layer that runs again; where the layer's own change is known, that is the one above it."""
        return self.layer if self._scale is None else self.layer + 1

    def _find_mode(self) -> None:
        """Set up the quickest mode in which these rows get the logits of the full pass; warn where it is a slow one."""
        modes = ["cached", "upper"]
        if self._preceding.can_be_shared:
            modes.insert(0, "shared")
        reasons: list[str] = []
        for mode in modes:
            reason = self._try(mode)
            if not reason:
                self.mode = mode
                break
            reasons.append(f"{mode}: {reason}")
        if self.mode in ("upper", "full"):  # "cached" costs little more than "shared", which short windows rule out
            warnings.warn(
                f"{type(self.view.model).__name__} is driven in mode '{self.mode}', slower than it could be ("
                + "; ".join(reasons)
                + ")",
                KecoreWarning,
                stacklevel=4,
            )

    @torch.no_grad()
    def _try(self, mode: str) -> str:
        """Set a mode up, and compare the last logits of a few rows with those of the full pass.

        Returns:
            Why the mode cannot be used, in words, with everything as it was before; empty where it can.
        """
        all_columns, lookup_column = self.rows, self.column
        sample = self._preceding.sample_rows().to(self.view.device)
        row = torch.arange(len(sample), device=self.view.device)
        last_column = all_columns.ends[sample] - 1  # [sample]
        expected = self.view.run(all_columns.select(sample), at=(row, last_column)).logits  # [sample, vocab]
        try:
            self._set_up(all_columns, mode)
            last_column -= lookup_column - self.column  # columns that were cut off
            unchanged = torch.zeros(len(sample), self.parts * self.view.width, device=self.view.device)
            replay = self.select(sample)
            replay._run(unchanged, row, last_column)
            logits = replay._run(unchanged, row, last_column)  # the second run, because a cache may keep the first
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            self._reset(all_columns, lookup_column)
            return f"{type(error).__name__}: {error}"
        error = difference(logits, expected)
        if error > rounding(self.view, expected.dtype):
            self._reset(all_columns, lookup_column)
            return f"logits differ by {error:.1e}"
        return ""

    def _reset(self, rows: Rows, column: int) -> None:
        self.rows, self.column, self.past, self.hidden = rows, column, None, None

    def _set_up(self, all_columns: Rows, mode: str) -> None:
        """Run once what a mode does not run again: the columns before the lookup tokens, and the lower layers."""
        cut = 0 if mode == "upper" else self.column
        mask = all_columns.attention_mask[:, cut:]
        if cut:
            cache, past_mask = self._preceding.run(shared=mode == "shared")
            self.past = (_make_read_only(cache), torch.cat([past_mask, mask], dim=1))  # mask [rows, past + width]
        self.rows = Rows(all_columns.input_ids[:, cut:], mask, (all_columns.offset - cut).clamp(min=0))
        self.column -= cut
        self.hidden = self._run_lower_layers()

    def _run_lower_layers(self) -> Tensor | None:
        """Return what the lowest layer that has to run again reads; None where that is the first."""
        if self._first_layer == 0:
            return None
        below = Output(self._first_layer - 1)
        return self.view.run(self.rows, taps=[below], last=below.layer, past=self.past)[below]

    def _run(self, delta: Tensor, row: Tensor, column: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return logits as :meth:`logits` does, at columns of the rows as they are run."""
        vectors = delta.split(self.view.width, dim=1)  # [rows, d_model] each
        patches: dict[Site, Patch] = {Value(self.layer): _add_in_column(self.column, vectors[0])}
        if self.mixer is not None:
            patches[ModuleOutput(self.mixer)] = _add_in_column(self.column, vectors[1])
        start: Start | None = None
        if self.hidden is not None:
            hidden = self.hidden.clone()  # [rows, width, d_model]
            if noise is not None:
                behind_lookup = hidden[:, self.column + 1 :]
                behind_lookup += noise[:, : behind_lookup.shape[1]].to(hidden)
            if self._scale is not None:
                hidden[:, self.column] += self._scale * delta.to(hidden)
                patches = {}  # the layer itself is not run again
            start = Start(self._first_layer, hidden)
        return self.view.run(self.rows, patches=patches, first=start, at=(row, column), past=self.past).logits

    def logits(self, delta: Tensor, row: Tensor, place: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the logits with a vector added at each row's lookup token.

        Args:
            delta: ``[rows, parts * d_model]``, added to the value projection's output and to the mixer's.
            row: ``[k]`` rows.
            place: ``[k]`` token indices within the row's own tokens.
            noise: ``[rows, >= width, d_model]``, added to the hidden states behind the lookup token; without effect
                in mode ``"full"``.

        Returns:
            ``[k, vocab]``, differentiable in ``delta``.
        """
        return self._run(delta, row, place + (self.column - self.lookups)[row], noise)

    @torch.no_grad()
    def lookup_norm(self, rows: Tensor, *, of_projection: bool = False) -> Tensor:
        """Return the norms that the vectors are relative to, ``[len(rows), parts]``.

        That of the layer's output at the lookup token, in units of the value projection; of the projection's own output
        where it is asked for, where a norm follows it, or where the mixer's is changed too, whose norm comes second.
        """
        scale = None if of_projection else self._scale
        if scale is not None and self.hidden is not None:
            states = [self.hidden]
        else:
            sites: list[Site] = [Value(self.layer) if scale is None else Output(self.layer)]
            if self.mixer is not None:
                sites.append(ModuleOutput(self.mixer))
            out = self.view.run(self.rows, taps=sites, last=self.layer, past=self.past)
            states = [out[site] for site in sites]  # [rows, width, d_model] each
        at_lookup = torch.stack([state[rows, self.column] for state in states], dim=1)  # [len(rows), parts, d_model]
        return at_lookup.float().norm(dim=2) / abs(scale or 1.0)

    @torch.no_grad()
    def at_layer(self, layer: int) -> Replay:
        """Return the same rows with another layer's output changed; tokens before the lookup are not run again."""
        replay = copy.copy(self)
        replay.layer = layer
        replay.hidden = replay._run_lower_layers() if self.mode != "full" else None
        return replay

    def select(self, rows: Tensor) -> Replay:
        """Return these rows alone; this object keeps its own."""
        replay = copy.copy(self)
        replay.rows, replay.lookups = self.rows.select(rows), self.lookups[rows]
        if self.hidden is not None:
            replay.hidden = self.hidden[rows]
        if self.past is not None:
            cache, mask = self.past
            cache = _copy_cache(cache)
            cache.reorder_cache(rows)
            replay.past = (cache, mask[rows])
        return replay


def _add_in_column(column: int, vectors: Tensor) -> Patch:
    """Return a patch that adds a vector ``[rows, d_model]`` to each row in one column."""

    def change(output: Tensor) -> Tensor:
        output = output.clone()
        output[:, column] += vectors.to(output)
        return output

    return change


class _PrecedingTokens:
    """The tokens that stand before the lookup token of each row, to be run once.

    Args:
        view: the model.
        encoder: for padding.
        ids: ``rows`` token sequences, of which some may be empty.
        opening: for each row the index of the text that it may begin with; None where no two rows share one.

    Attributes:
        can_be_shared: some opening has tokens that several rows begin with.
    """

    def __init__(
        self, view: ModelView, encoder: Encoder, ids: Sequence[Sequence[int]], opening: Sequence[int] | None
    ) -> None:
        self.view, self.encoder, self.ids = view, encoder, ids
        rows_of_opening: dict[int, list[int]] = {}
        for row, index in enumerate(range(len(ids)) if opening is None else opening):
            rows_of_opening.setdefault(index, []).append(row)
        self.openings: list[list[int]] = []  # the tokens that all rows of an opening begin with
        self.opening_of_row = torch.empty(len(ids), dtype=torch.long)  # [rows], index into `openings`
        self.can_be_shared = False
        for rows in rows_of_opening.values():
            self.opening_of_row[rows] = len(self.openings)
            self.openings.append(common_prefix([ids[row] for row in rows]))
            if self.openings[-1] and len(rows) > 1:
                self.can_be_shared = True
        self.tails: list[Sequence[int]] = []  # each row without its opening
        for row, index in zip(ids, self.opening_of_row.tolist(), strict=True):
            self.tails.append(row[len(self.openings[index]) :])

    def sample_rows(self, count: int = 4) -> Tensor:
        """Choose up to ``count`` rows ``[count]``, from the one with the shortest tail to the one with the longest.

        The shortest is padded most behind its opening, which windows of attention count in.
        """
        by_length = torch.tensor([len(tail) for tail in self.tails]).argsort(stable=True)
        return by_length[torch.linspace(0, len(by_length) - 1, min(count, len(by_length))).long()]

    def run(self, *, shared: bool) -> tuple[Any, Tensor]:
        """Return a cache of all rows, and the mask of its columns ``[rows, past]``.

        With ``shared`` there may be padding between a row's opening and its tail, which positions leave out.
        """
        if not shared or not any(self.openings):
            return self._extend(self.ids, None)
        cache, mask = self._extend(self.openings, None)
        # One row an opening becomes one row a text.
        cache.reorder_cache(self.opening_of_row.to(self.view.device))
        mask = mask[self.opening_of_row.to(mask.device)]  # [rows, opening]
        return self._extend(self.tails, (cache, mask)) if any(self.tails) else (cache, mask)

    def _extend(self, ids: Sequence[Sequence[int]], past: tuple[Any, Tensor] | None) -> tuple[Any, Tensor]:
        """Run token rows behind a cache, and return the cache with them and the mask of its columns."""
        rows = self.encoder.rows(ids, [len(row) - 1 for row in ids]).to(self.view.device)
        mask = rows.attention_mask
        if past is not None:
            mask = torch.cat([past[1], mask], dim=1)  # [rows, past + width]
            past = (past[0], mask)
        one = torch.zeros(1, dtype=torch.long)  # nobody needs logits here, and they would be the largest part
        cache = self.view.run(rows, at=(one, one), past=past, use_cache=True).cache
        if cache is None:
            raise ValueError("the model keeps no key-value cache")
        return cache, mask


def _copy_cache(cache: Any) -> Any:
    """Return a read-only copy whose layers may be changed without changing the first; states are shared until then."""
    outer = copy.copy(cache)
    inner = outer
    if hasattr(outer, "self_attention_cache"):
        inner = outer.self_attention_cache = copy.copy(outer.self_attention_cache)
    inner.layers = [copy.copy(layer) for layer in inner.layers]
    for layer in inner.layers:
        for name, states in list(layer.__dict__.items()):
            if isinstance(states, dict):
                layer.__dict__[name] = dict[Any, Any](states)
    return _make_read_only(outer)


def _make_read_only(cache: Any) -> Any:
    """Let every layer of a cache return past and new states without keeping the new ones."""
    for layer in getattr(cache, "self_attention_cache", cache).layers:
        for name in dir(type(layer)):
            if name.startswith("update"):  # of keys and values, and of convolution and recurrent states
                setattr(layer, name, _ReadOnlyUpdate(layer, name))
    return cache


class _ReadOnlyUpdate:
    """An update of a cache layer that leaves the layer as it was.

    The layer holds this object, so this one refers to the layer weakly: a cache goes as soon as nobody uses it.
    """

    def __init__(self, layer: Any, method: str) -> None:
        self.layer, self.method = weakref.ref(layer), method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self.layer()
        attributes = dict(layer.__dict__)
        try:
            # States of linear attention are kept in dictionaries and written in place.
            for name, states in attributes.items():
                if isinstance(states, dict):
                    layer.__dict__[name] = _clone_states(states)
            return getattr(type(layer), self.method)(layer, *args, **kwargs)
        finally:
            layer.__dict__.clear()
            layer.__dict__.update(attributes)


def _clone_states(states: dict[Any, Any]) -> dict[Any, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in states.items()}
