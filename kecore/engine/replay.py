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
from collections.abc import Callable, Sequence
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
        # What is added before the feed-forward block changes what that reads, so the layer itself has to run.
        self.scale = view.layers[layer].residual_scale if mixer is None else None
        # Where nothing stands between projection and residual stream, the edited layer itself is done too.
        self.start = layer + 1 if self.scale is not None else layer
        self.rows = encoder.rows(ids, lookups).to(view.device)
        self.column = max(lookups)
        self.lookups = torch.tensor(lookups, device=view.device)
        self._before = _Before(view, encoder, [row[:at] for row, at in zip(ids, lookups, strict=True)], opening)
        self.past: tuple[Any, Tensor] | None = None
        self.hidden: Tensor | None = None
        self.mode = mode or "full"
        if mode is None:
            self._find_mode()
        elif mode != "full":
            with torch.no_grad():
                self._set_up(self.rows, mode)

    def _find_mode(self) -> None:
        reasons: list[str] = []
        for mode in (*(["shared"] if self._before.alike else []), "cached", "upper"):
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
        """Set a mode up and compare a few places with the full forward pass; the reason if they differ."""
        whole, column = self.rows, self.column
        count = len(whole.input_ids)
        # With an opening apart, the row with the least behind it is padded most, which windows of attention count in.
        some = self._before.rest.argsort(stable=True)[torch.linspace(0, count - 1, min(4, count)).long()]
        some = some.to(whole.input_ids.device)
        ends = whole.input_ids.shape[1] - 1 - whole.attention_mask[some].flip(1).argmax(1)
        row = torch.arange(len(some), device=some.device)
        expected = self.view.run(whole.select(some), at=(row, ends)).logits
        try:
            self._set_up(whole, mode)
            cut = column - self.column
            zero = torch.zeros(len(some), self.parts * self.view.width, device=self.view.device)
            part = self.select(some)
            part._run(zero, row, ends - cut)
            got = part._run(zero, row, ends - cut)  # the second run, because a cache may keep the first
        except (
            RuntimeError,
            TypeError,
            ValueError,
            AttributeError,
            IndexError,
            NotImplementedError,
        ) as error:
            self._reset(whole, column)
            return f"{type(error).__name__}: {error}"
        error = difference(got, expected)
        if error > rounding(self.view, expected.dtype):
            self._reset(whole, column)
            return f"logits differ by {error:.1e}"
        return ""

    def _reset(self, rows: Rows, column: int) -> None:
        self.rows, self.column, self.past, self.hidden = rows, column, None, None

    def _set_up(self, whole: Rows, mode: str) -> None:
        cut = 0 if mode == "upper" else self.column
        ids, mask = whole.input_ids[:, cut:], whole.attention_mask[:, cut:]
        if cut:
            cache, before = self._before.run(shared=mode == "shared")
            self.past = (_read_only(cache), torch.cat([before, mask], dim=1))
        self.rows = Rows(ids, mask, (whole.offset - cut).clamp(min=0))
        self.column -= cut
        self.hidden = self._below()

    def _below(self) -> Tensor | None:
        """Return what the lowest layer that has to run again reads; None where that is the first."""
        if self.start == 0:
            return None
        below = Output(self.start - 1)
        return self.view.run(self.rows, taps=[below], last=below.layer, past=self.past)[below]

    def _run(self, delta: Tensor, row: Tensor, column: Tensor, noise: Tensor | None = None) -> Tensor:
        def add(part: Tensor) -> Callable[[Tensor], Tensor]:
            def change(output: Tensor) -> Tensor:
                output = output.clone()
                output[:, self.column] += part.to(output)
                return output

            return change

        parts = delta.split(self.view.width, dim=1)
        first: Start | None = None
        patches: dict[Site, Patch] = {Value(self.layer): add(parts[0])}
        if self.mixer is not None:
            patches[ModuleOutput(self.mixer)] = add(parts[1])
        if self.hidden is not None:
            hidden = self.hidden.clone()
            if noise is not None:
                after = hidden[:, self.column + 1 :]
                after += noise[:, : after.shape[1]].to(hidden)
            if self.scale is not None:
                hidden[:, self.column] += self.scale * delta.to(hidden)
                patches = {}
            first = Start(self.start, hidden)
        return self.view.run(self.rows, patches=patches, first=first, at=(row, column), past=self.past).logits

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

    @property
    def parts(self) -> int:
        """How many vectors are added to a row."""
        return 1 if self.mixer is None else 2

    @torch.no_grad()
    def lookup_norm(self, rows: Tensor) -> Tensor:
        """Return the norms that the vectors are relative to, ``[len(rows), parts]``.

        That of the layer's output at the lookup token, in units of the value projection; of the projection's own output
        where a norm follows it, or where the mixer's is changed too, whose norm comes second.
        """
        layer = self.layer
        if self.scale is not None and self.hidden is not None:
            found = [self.hidden]
        else:
            taps: list[Site] = [Value(layer) if self.scale is None else Output(layer)]
            if self.mixer is not None:
                taps.append(ModuleOutput(self.mixer))
            out = self.view.run(self.rows, taps=taps, last=layer, past=self.past)
            found = [out[site] for site in taps]
        at = torch.stack([part[rows, self.column] for part in found], dim=1)
        return at.float().norm(dim=2) / abs(self.scale or 1.0)

    @torch.no_grad()
    def at_layer(self, layer: int) -> Replay:
        """Return the same rows with another layer's output changed; tokens before the lookup are not run again."""
        other = copy.copy(self)
        other.layer = layer
        other.scale = self.view.layers[layer].residual_scale if self.mixer is None else None
        other.start = layer + 1 if other.scale is not None else layer
        other.hidden = other._below() if self.mode != "full" else None
        return other

    def select(self, rows: Tensor) -> Replay:
        """Return these rows alone; this object keeps its own."""
        some = copy.copy(self)
        some.rows, some.lookups = self.rows.select(rows), self.lookups[rows]
        if self.hidden is not None:
            some.hidden = self.hidden[rows]
        if self.past is not None:
            cache, mask = self.past
            cache = _copy(cache)
            cache.reorder_cache(rows)
            some.past = (cache, mask[rows])
        return some


class _Before:
    """What stands before the lookup token of each row, to be run once.

    Args:
        view: the model.
        encoder: for padding.
        ids: ``rows`` token sequences, of which some may be empty.
        opening: for each row the index of the text that it may begin with.
    """

    def __init__(
        self, view: ModelView, encoder: Encoder, ids: Sequence[Sequence[int]], opening: Sequence[int] | None
    ) -> None:
        self.view, self.encoder, self.ids = view, encoder, ids
        members: dict[int, list[int]] = {}
        for row, index in enumerate(opening or range(len(ids))):
            members.setdefault(index, []).append(row)
        self.heads = [common_prefix([ids[row] for row in rows]) for rows in members.values()]
        self.head = torch.empty(len(ids), dtype=torch.long)
        for place, rows in enumerate(members.values()):
            self.head[rows] = place
        self.rest = torch.tensor(
            [len(row) - len(self.heads[at]) for row, at in zip(ids, self.head.tolist(), strict=True)]
        )
        self.alike = any(head and len(rows) > 1 for head, rows in zip(self.heads, members.values(), strict=True))

    def run(self, *, shared: bool) -> tuple[Any, Tensor]:
        """Return a cache of all rows, and the mask of its columns ``[rows, past]``.

        With ``shared`` there may be padding between a row's opening and the rest of it, which positions leave out.
        """
        if not shared or not any(self.heads):
            return self._extend(self.ids, None)
        cache, mask = self._extend(self.heads, None)
        cache.reorder_cache(self.head.to(self.view.device))
        mask = mask[self.head.to(mask.device)]
        rest = [row[len(self.heads[place]) :] for row, place in zip(self.ids, self.head.tolist(), strict=True)]
        return self._extend(rest, (cache, mask)) if any(rest) else (cache, mask)

    def _extend(self, ids: Sequence[Sequence[int]], past: tuple[Any, Tensor] | None) -> tuple[Any, Tensor]:
        """Run token rows behind a cache."""
        rows = self.encoder.rows(ids, [len(row) - 1 for row in ids]).to(self.view.device)
        mask = rows.attention_mask
        if past is not None:
            mask = torch.cat([past[1], mask], dim=1)
            past = (past[0], mask)
        one = torch.zeros(1, dtype=torch.long)  # nobody needs logits here, and they would be the largest part
        cache = self.view.run(rows, at=(one, one), past=past, use_cache=True).cache
        if cache is None:
            raise ValueError("the model keeps no key-value cache")
        return cache, mask


def _copy(cache: Any) -> Any:
    """Return a read-only copy whose layers may be changed without changing the first; states are shared until then."""
    outer = copy.copy(cache)
    inner = outer
    if hasattr(outer, "self_attention_cache"):
        inner = outer.self_attention_cache = copy.copy(outer.self_attention_cache)
    inner.layers = [copy.copy(layer) for layer in inner.layers]
    for layer in inner.layers:
        layer.__dict__.update((n, dict(v)) for n, v in layer.__dict__.items() if isinstance(v, dict))
    return _read_only(outer)


def _read_only(cache: Any) -> Any:
    """Let every layer of a cache return past and new states without keeping the new ones."""
    for layer in getattr(cache, "self_attention_cache", cache).layers:
        for name in dir(type(layer)):
            if name.startswith("update"):  # of keys and values, and of convolution and recurrent states
                setattr(layer, name, _Unkept(layer, name))
    return cache


class _Unkept:
    """An update of a cache layer that leaves the layer as it was; the layer holds this, so this does not hold it."""

    def __init__(self, layer: Any, method: str) -> None:
        self.layer, self.method = weakref.ref(layer), method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self.layer()
        before = dict(layer.__dict__)
        try:
            # States of linear attention are kept in dictionaries and written in place.
            layer.__dict__.update((n, _copied(value)) for n, value in before.items() if isinstance(value, dict))
            return getattr(type(layer), self.method)(layer, *args, **kwargs)
        finally:
            layer.__dict__.clear()
            layer.__dict__.update(before)


def _copied(states: dict[Any, Any]) -> dict[Any, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in states.items()}
