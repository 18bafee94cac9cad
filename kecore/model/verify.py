"""Proving by perturbation what the probe has found, before anything relies on it.

What is checked, each with the model's own forward pass on a few tokens:

* the layers are a chain: resuming at a layer from the output of the one before reproduces the full pass;
* a vector added to a value projection's output at one token changes the layer's output at that token and
  nowhere else; two vectors of different length tell whether it arrives unchanged, scaled, or through a norm;
* the stack ends in the logits;
* no token sees later ones, and whether padding before a row's tokens changes anything;
* logits can be taken at single tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kecore.api.errors import UnsupportedModelError
from kecore.model.caches import join_caches, kept_cache
from kecore.model.sites import ModuleOutput, Output, Patch, Site, Start, Value
from kecore.text import Rows

if TYPE_CHECKING:
    from kecore.model.linear import LinearView
    from kecore.model.view import LayerView, ModelView, Pass

__all__ = [
    "BROKEN",
    "TOKENS",
    "continues",
    "difference",
    "joins",
    "probe_ids",
    "rounding",
    "verified",
    "verified_whole",
]

TOKENS = 6
"""Tokens of the probe: enough to tell "this token only" from "later tokens too"."""

_COLUMN = 3  # of the token that is changed, with others on both sides
_LENGTHS = (1.0, -4.0)  # of the two vectors, in units of what flows there: a norm would make them equal
_PADDING = 2  # tokens

BROKEN = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
"""What a model may raise that is run in a way it was not written for."""


def probe_ids(model: nn.Module) -> Tensor:
    """Return ``[1, TOKENS]`` distinct token ids, away from the special ones that usually open the vocabulary."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    ids = [(weight.shape[0] // 2 + 7 * i) % weight.shape[0] for i in range(TOKENS)]
    return torch.tensor([ids], device=weight.device)


def verified(view: ModelView, logits: Tensor) -> ModelView:
    """Return the view with everything in it that takes a pass to find out, once all of it has been checked.

    Args:
        view: what the probe has found.
        logits: ``[1, TOKENS, vocab]``, the model's own on :func:`probe_ids`, called plainly.

    Raises:
        UnsupportedModelError: names what does not hold.
    """
    ids = probe_ids(view.model).expand(1 + len(_LENGTHS), -1)
    rows = Rows(ids, torch.ones_like(ids), torch.zeros(len(ids), dtype=torch.long))
    layers = range(len(view.layers))
    view = _positioned(view, rows, logits)
    whole = view.run(rows, taps=[*map(Output, layers), *map(Value, layers)])
    _check_own_weights(view)
    view = _ordered(view, whole[Output(layers[-1])][0])
    view = _resumable(view, rows, whole)
    verified_layers: list[LayerView] = []
    for layer in view.layers:
        scale = _residual_scale(view, layer, rows, whole)
        verified_layers.append(replace(_with_experts(view, layer, rows, whole), residual_scale=scale))
    _check_end(view, rows, whole)
    _check_gather(view, rows, whole)
    return replace(view, layers=tuple(verified_layers))


def verified_whole(view: ModelView) -> ModelView:
    """Return the view of a model that is only run as a whole, with what takes a pass to find out.

    Raises:
        UnsupportedModelError: it cannot be asked either; names what does not hold.
    """
    ids = probe_ids(view.model)
    logits = view.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    rows = Rows(ids.expand(2, -1), torch.ones(2, TOKENS, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    view = _positioned(view, rows, logits)
    whole = view.run(rows)
    view = _ordered(view, whole.logits[0])
    _check_gather(view, rows, whole)
    return view


@torch.no_grad()
def continues(view: ModelView, *, dropping: bool = False) -> bool:
    """Return whether passes over a cache, one token each, give what one pass gives over all; also behind padding.

    A cache that a model hands out may want to be called in a way of its own (recurrent states do).

    Args:
        view: the model.
        dropping: take the first row out of the cache on the way.
    """
    if view.handover is not None:
        return False  # the encoder's part of a row is not in the decoder's cache
    if not view.layers:
        return False  # how the layers use their caches is not known either
    ids = probe_ids(view.model)
    ids = torch.cat([ids, ids.roll(1, dims=1)])
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    rows = Rows(ids, mask, torch.tensor([0, 1]))
    try:
        with view.frozen():
            expected = view.model(**view.arguments(rows)).logits[:, -1]  # [rows, vocab]
            cache, logits = None, expected
            # Some tokens at once, then each of the others by itself.
            for begin, end in pairwise((0, _COLUMN, *range(_COLUMN + 1, TOKENS + 1))):
                offset = rows.offset if begin == 0 else torch.zeros(len(ids), dtype=torch.long)
                next_tokens = Rows(ids[:, begin:end], mask[:, begin:end], offset)
                past = None if cache is None else (cache, mask[:, :end])
                result = view.model(**view.arguments(next_tokens, past, use_cache=True))
                cache, logits = kept_cache(result), result.logits[:, -1]
                if dropping and end == _COLUMN + 1:
                    cache.reorder_cache(torch.tensor([1], device=view.device))
                    ids, mask, expected = ids[1:], mask[1:], expected[1:]
    except BROKEN:
        return False
    return all(difference(row, whole) <= rounding(view) for row, whole in zip(logits, expected, strict=True))


@torch.no_grad()
def joins(view: ModelView) -> bool:
    """Return whether rows of different lengths go on over one joined cache as each does by itself.

    Args:
        view: a model that :func:`continues`.
    """
    ids = probe_ids(view.model)
    texts = [ids, ids.roll(1, dims=1)[:, 1:]]  # [1, TOKENS] and [1, TOKENS - 1]
    mask = torch.ones_like(ids).repeat(2, 1)
    mask[1, 0] = 0
    offset = torch.zeros(2, dtype=torch.long)
    written = 2  # tokens of each row that are run one by one over the joined cache
    expected: list[Tensor] = []
    caches: list[Any] = []
    try:
        with view.frozen():
            for text in texts:
                whole = Rows(text, torch.ones_like(text), offset[:1])
                expected.append(view.model(**view.arguments(whole)).logits[0, -1])  # [vocab]
                begun = Rows(text[:, :-written], torch.ones_like(text[:, :-written]), offset[:1])
                caches.append(kept_cache(view.model(**view.arguments(begun, use_cache=True))))
            cache, other = caches
            if not join_caches(cache, other):
                return False
            ends = torch.cat([text[:, -written:] for text in texts])  # [rows, written]
            logits = ends
            for column in range(written):
                step = Rows(ends[:, column, None], torch.ones_like(ends[:, :1]), offset)
                past = cache, mask[:, : TOKENS - written + column + 1]
                result = view.model(**view.arguments(step, past, use_cache=True))
                cache, logits = kept_cache(result), result.logits[:, -1]  # [rows, vocab]
    except BROKEN:
        return False
    return all(difference(row, whole) <= rounding(view) for row, whole in zip(logits, expected, strict=True))


def _positioned(view: ModelView, rows: Rows, logits: Tensor) -> ModelView:
    """Return the view, with ``positions`` off if the model takes none or counts in another way."""
    takes_position_ids = view.positions and "position_ids" in inspect.signature(view.model.forward).parameters
    candidates = [True, False] if takes_position_ids else [False]
    for positions in candidates:
        view = replace(view, positions=positions)
        if difference(view.run(rows).logits[0], logits[0]) <= rounding(view):
            return view
    raise UnsupportedModelError(
        f"{type(view.model).__name__}: equal rows give other logits together than one of them alone"
    )


def _store(linear: LinearView) -> nn.Parameter | nn.Module:
    """Return what holds a matrix: its parameter, or the module that keeps it packed."""
    return linear.module if linear.packed is not None else linear.parameter


def _check_own_weights(view: ModelView) -> None:
    """Refuse layers that share a value projection: an edit of one would be an edit of the other."""
    layer_of_parameter: dict[int, LayerView] = {}
    for layer in view.layers:
        for store in {_store(site.linear): None for site in layer.sites}:
            other = layer_of_parameter.setdefault(id(store), layer)
            if other is not layer:
                names = [one.sites[0].linear.name for one in (layer, other)]
                raise UnsupportedModelError(
                    f"{names[0]} and {names[1]} are one parameter; layers that share their weights cannot be edited "
                    "apart"
                )


def _start(layer: int, whole: Pass) -> Start | None:
    """Return where a pass begins that runs a layer on what the whole pass gave it."""
    return Start(layer, whole[Output(layer - 1)]) if layer > 0 else None


def _resumable(view: ModelView, rows: Rows, whole: Pass) -> ModelView:
    """Return the view, with ``skips`` off if a layer needs more of the lower ones than their output."""
    for skips in (True, False):
        view = replace(view, skips=skips)
        reason = _chain_error(view, rows, whole)
        if not reason:
            return view
    raise UnsupportedModelError(
        f"{type(view.model).__name__}: the modules of {view.layers[0].name.rpartition('.')[0]} do not form a chain in "
        f"which each continues from the output of the one before: {reason}"
    )


def _chain_error(view: ModelView, rows: Rows, whole: Pass) -> str:
    """Return why the layers do not go on from one another's outputs; empty if they do."""
    for layer in view.layers[1:]:
        output = Output(layer.index)
        try:
            again = view.run(rows, taps=[output], first=_start(layer.index, whole), last=layer.index)[output]
        except BROKEN as error:
            return f"{layer.name} fails on its own ({type(error).__name__}: {error})"
        error = difference(again, whole[output])
        if error > _close(view):
            return f"{layer.name} gives another output (relative difference {error:.1e})"
    return ""


def _bumps(view: ModelView, layer: int, whole: Pass) -> Tensor:
    """Return random vectors ``[2, d_model]`` of the size of what flows in a layer."""
    # At this token alone: the first one of a text may be thousands of times larger.
    value = whole[Value(layer)][0, _COLUMN].float()  # [d_model]
    hidden = whole[Output(layer)][0, _COLUMN].float()  # [d_model]
    generator = torch.Generator().manual_seed(layer)
    noise = torch.randn(len(_LENGTHS), view.width, generator=generator).to(hidden)
    return torch.tensor(_LENGTHS).to(hidden)[:, None] * (value.std() + hidden.std()) * noise


def _added(bumps: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a patch that adds a vector to every row but the first, at one token."""

    def add(output: Tensor) -> Tensor:
        output = output.clone()
        output[1:, _COLUMN] += bumps.to(output)
        return output

    return add


def _moved(new: Tensor, old: Tensor) -> tuple[float, float]:
    """Return the least relative change at the token that was changed, and the largest at any other.

    Args:
        new: ``[rows, tokens, n]``, of which all rows but the first were changed at one token.
        old: the same without the change.
    """
    length = old[1:].float().norm(dim=-1).clamp(min=1e-30)  # [rows - 1, tokens]
    change = (new - old)[1:].float().norm(dim=-1) / length  # [rows - 1, tokens]
    elsewhere = torch.cat([change[:, :_COLUMN], change[:, _COLUMN + 1 :]], 1)  # [rows - 1, tokens - 1]
    return float(change[:, _COLUMN].min()), float(elsewhere.max())


def _residual_scale(view: ModelView, layer: LayerView, rows: Rows, whole: Pass) -> float | None:
    """Return how much of a vector added to the value arrives in the layer's output; None if a norm is between."""
    index, output, bumps = layer.index, Output(layer.index), _bumps(view, layer.index, whole)
    patches: dict[Site, Patch] = {Value(index): _added(bumps)}
    changed = view.run(rows, taps=[output], patches=patches, first=_start(index, whole), last=index)[output]
    there, elsewhere = _moved(changed, whole[output])
    eps = torch.finfo(view.dtype).eps
    if there <= 8 * eps or elsewhere > _close(view):
        raise UnsupportedModelError(
            f"{layer.block.name}: a change of this map's output at one token must change the layer's "
            f"output at that token alone; it changed by a part of {there:.2g} there and by {elsewhere:.2g} elsewhere. "
            "Name another map with ModelView.of(model, value_projection='path.inside.layer')"
        )
    return _linear_scale(bumps, (changed[1:] - changed[:1])[:, _COLUMN].float(), eps)


def _linear_scale(bumps: Tensor, arrived: Tensor, eps: float) -> float | None:
    """Return ``c`` where what arrived is ``c`` times what was added, ``[2, d_model]`` each; None where it is not."""
    scale = float((arrived * bumps).sum() / (bumps * bumps).sum())
    if difference(scale * bumps, arrived) > max(1e-3, 8 * eps):
        return None
    return 1.0 if abs(scale - 1) < max(1e-3, 8 * eps) else scale


def _with_experts(view: ModelView, layer: LayerView, rows: Rows, whole: Pass) -> LayerView:
    """Return a layer with what arrives of its experts' output at the block's, without sites where it is no multiple."""
    if layer.experts is None:
        return layer
    index, value, bumps = layer.index, Value(layer.index), _bumps(view, layer.index, whole)
    patches: dict[Site, Patch] = {ModuleOutput(layer.experts.module): _added(bumps)}
    changed = view.run(rows, taps=[value], patches=patches, first=_start(index, whole), last=index)[value]
    there, elsewhere = _moved(changed, whole[value])
    eps = torch.finfo(view.dtype).eps
    scale = _linear_scale(bumps, (changed[1:] - changed[:1])[:, _COLUMN].float(), eps)
    if scale is None or there <= 8 * eps or elsewhere > _close(view):
        reason = (
            f"what is added to the output of its experts ({layer.experts.name}) does not arrive in the layer's block "
            "as a multiple of it, at the same token alone (a norm stands between)"
        )
        return replace(layer, sites=(), experts=None, no_sites=reason)
    return replace(layer, experts=replace(layer.experts, scale=scale))


def _check_end(view: ModelView, rows: Rows, whole: Pass) -> None:
    """Check that what the last layer writes at a token decides the logits of that token, and of no other."""
    last = view.layers[-1]
    patches: dict[Site, Patch] = {Value(last.index): _added(_bumps(view, last.index, whole))}
    logits = view.run(rows, patches=patches, first=_start(last.index, whole)).logits
    there, elsewhere = _moved(logits, whole.logits)
    if there <= _close(view) or elsewhere > _close(view):
        raise UnsupportedModelError(
            f"{type(view.model).__name__}: {last.name.rpartition('.')[0]} is not the stack that the logits come from; "
            f"a change of its output at one token changed that token's logits by a part of {there:.2g} and others' by "
            f"{elsewhere:.2g}"
        )


def _ordered(view: ModelView, expected: Tensor) -> ModelView:
    """Return the view, with ``left_padding`` off if it matters; refuse models in which tokens see later ones."""
    ids = probe_ids(view.model)
    # Not the model's own padding token: only the attention mask says what is padding.
    padding, other_padding = ids[:, 1 : 1 + _PADDING], ids[:, -_PADDING:]
    other_end = ids.clone()
    other_end[0, -1] = ids[0, 0]
    tokens_and_padding = [(ids, padding), (other_end, padding), (padding, ids), (other_padding, ids)]
    right_padded = torch.cat([torch.ones_like(ids), torch.zeros_like(padding)], 1)
    left_padded = torch.cat([torch.zeros_like(padding), torch.ones_like(ids)], 1)
    rows = Rows(
        torch.cat([torch.cat(row, 1) for row in tokens_and_padding]),  # [4, tokens + padding]
        torch.cat([right_padded, right_padded, left_padded, left_padded]),
        torch.tensor([0, 0, _PADDING, _PADDING]),
    )
    if view.layers:
        last = len(view.layers) - 1
        states = view.run(rows, taps=[Output(last)], last=last)[Output(last)]  # [4, tokens + padding, d_model]
    else:
        states = view.run(rows).logits  # [4, tokens + padding, vocab]
    alone, changed = states[:2, : TOKENS - 1]  # [tokens - 1, d_model] each
    seen = difference(changed, alone)
    if seen > _close(view):
        raise UnsupportedModelError(
            f"{type(view.model).__name__} is not causal: a later token changes an earlier one (relative difference "
            f"{seen:.1e})"
        )
    behind, behind_other = states[2:, _PADDING:]  # [tokens, d_model] each, behind one padding and behind another
    if view.handover is not None:
        return view  # its rows are always given with all padding on the right
    is_ignored = difference(behind_other, behind) <= _close(view) and difference(behind, expected) <= rounding(view)
    return replace(view, left_padding=is_ignored)


def _check_gather(view: ModelView, rows: Rows, whole: Pass) -> None:
    """Check that the unembedding gives the logits of a token from the hidden state of that token alone."""
    at = (torch.zeros(1, dtype=torch.long), torch.tensor([_COLUMN]))
    last = len(view.layers) - 1
    try:
        first = _start(last, whole) if view.layers else None
        alone = view.run(rows, first=first, at=at).logits  # [1, vocab]
        error_size, reason = difference(alone[0], whole.logits[0, _COLUMN]), ""
    except BROKEN as error:
        error_size, reason = float("inf"), f" ({type(error).__name__}: {error})"
    if error_size > _close(view):
        raise UnsupportedModelError(
            f"{type(view.model).__name__}: {type(view.unembedding).__name__} as output embedding does not give "
            f"the model's logits from the hidden state of single tokens{reason}"
        )


def difference(result: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to what is expected; infinite where shapes differ."""
    if result.shape != expected.shape:
        return float("inf")
    scale = expected.float().norm().clamp(min=torch.finfo(torch.float32).tiny)
    return float((result.float() - expected.float()).norm() / scale)


def _close(view: ModelView) -> float:
    """Return the relative difference that equal computations may show: none, but for the order of sums."""
    return min(0.03, rounding(view))


def rounding(view: ModelView, dtype: torch.dtype | None = None) -> float:
    """Return the relative difference that rounding may make between passes of different shape."""
    return min(0.1, 64 * torch.finfo(dtype or view.dtype).eps * max(1, len(view.layers)) ** 0.5)
