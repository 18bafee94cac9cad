"""What the stages of locate-then-edit take in memory, from the lengths of the prompts and the shapes of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from kecore.batch import RequestBatch
from kecore.memory import (
    Need,
    Work,
    backward_bytes,
    cached_bytes,
    cast_bytes,
    forward_bytes,
    logits_bytes,
    pass_tokens,
    vocabulary_size,
)
from kecore.model import ModelView

__all__ = ["Shape", "closed_form"]

_ESSENCE = 3  # tokens behind the subject in a prompt that asks what it is
_OPENING = 3  # tokens of a context's opening and of the full stop behind it
_SMALL, _PADDING = 1024, 1.2  # what a micro-batch of values may have in tokens, and in padding beyond them
_GRADIENT = 3  # times the work of a pass that stores nothing
_TOGETHER = 256  # groups of one micro-batch, roughly


@dataclass(frozen=True, slots=True)
class Shape:
    """The choices of a configuration that decide memory and time.

    Args:
        layers: edited layers.
        contexts: sampled prefixes.
        context_tokens: length of each.
        each: every context's key is an equation of its own.
        kl: there is a prompt more for each group.
        precision: type of the weights while values are optimised; None for the model's.
        derived: what of the key statistics the solve reads.
        anchor: layer that values are optimised for; None for the last edited one.
        steps: evaluations of the loss of a value.
    """

    layers: tuple[int, ...]
    contexts: int
    context_tokens: int
    each: bool = True
    kl: bool = True
    precision: torch.dtype | None = None
    derived: Literal["factor", "spectrum", "nothing"] = "factor"
    anchor: int | None = None
    steps: int = 20


def closed_form(view: ModelView, batch: RequestBatch, shape: Shape) -> list[Need]:
    """Return what the stages of :class:`~kecore.engine.closed_form.ClosedForm` need."""
    prefix = _OPENING + shape.context_tokens if shape.contexts else 0
    return [
        _values(view, shape, batch, prefix),
        _keys(view, shape, batch, prefix),
        _solve(view, shape, len(batch.subjects)),
    ]


def _values(view: ModelView, shape: Shape, batch: RequestBatch, prefix: int) -> Need:
    layer = max(shape.layers) if shape.anchor is None else shape.anchor
    u, prompts = len(batch.subjects), batch.located()
    contexts = shape.contexts + 1  # with the bare prompt
    group_tokens = dict.fromkeys(range(u), _ESSENCE if shape.kl else 0)  # that run, of each group
    positions = u if shape.kl else 0  # whose logits are read
    cached = longest = 0
    for group, prompt in zip(batch.groups, prompts, strict=True):
        length, lookup = len(prompt.ids), prompt.lookup
        longest = max(longest, length - lookup)
        group_tokens[group] += contexts * (length - lookup)
        cached += contexts * (prefix + lookup)
        positions += contexts * (length - prompt.start)
    tokens = sum(group_tokens.values())
    rows = len(prompts) * (contexts + 1 if shape.kl else contexts)
    # Rows of different lengths share a micro-batch while it is small, and are padded to the longest.
    padded = min(rows * longest, max(_SMALL, int(_PADDING * tokens)))
    per_token = (
        backward_bytes(view, layer, shape.precision)
        + cached * cached_bytes(view, layer, shape.precision) // tokens
        + positions * logits_bytes(view) // tokens
    )
    parts = {"values and their moments": 4 * 6 * u * view.width}
    if shape.kl:
        parts["first answers about subjects"] = 4 * min(u, _TOGETHER) * vocabulary_size(view)
    parts |= cast_bytes(view, shape.precision)
    if view.device.type == "cpu":
        parts["unembedding, laid out anew"] = 4 * vocabulary_size(view) * view.width
    evaluations = _GRADIENT * shape.steps
    work = Work(
        passes=evaluations * math.ceil(tokens / _SMALL),
        tokens=evaluations * tokens,
        layers=len(view.layers) - layer,
        logits=evaluations * positions,
    )
    return Need("values", parts, per_token, max(tokens, padded), max(group_tokens.values()), work=work)


def _keys(view: ModelView, shape: Shape, batch: RequestBatch, prefix: int) -> Need:
    lengths = [prompt.lookup + 1 for prompt in batch.located()]  # a key's row ends with the subject
    u, rows = len(batch.subjects), len(lengths) * (shape.contexts + 1)
    tokens = sum(lengths) * (shape.contexts + 1) + len(lengths) * shape.contexts * prefix
    d = _key_width(view, shape)
    parts = {
        "hidden states below the edited layers": tokens * view.width * view.dtype.itemsize,
        "keys": 2 * 4 * rows * d,
        "weights of contexts": 4 * u * rows,
        "updates so far": 4 * u * (d + view.width) * len(shape.layers),
        "edited matrices": 3 * 4 * d * view.width,
    }
    at_once = min(tokens, pass_tokens(view))
    work = Work(
        passes=math.ceil(tokens / at_once) * len(shape.layers),
        tokens=tokens * len(shape.layers),  # each layer's keys follow from the layers that were edited below it
        layers=1 + max(shape.layers) // 2,
    )
    return Need("keys", parts, forward_bytes(view), at_once, max(lengths) + prefix, work=work)


def _key_width(view: ModelView, shape: Shape) -> int:
    return max(site.linear.d_in for layer in shape.layers for site in view.layers[layer].sites)


def _solve(view: ModelView, shape: Shape, u: int) -> Need:
    d = _key_width(view, shape)
    n = u * (shape.contexts + 1) if shape.each else u
    system = min(n, d)
    parts = {
        "keys, whitened": (4 + 4 + 8) * n * d,
        "small system": 8 * (3 * system * system + n * u + u * u),
        "update": (4 + 8) * u * (d + view.width),
        "matrix": 3 * 4 * d * view.width,
    }
    mapped = {
        "factor": {"key statistics": 4 * d * d, "factor": 4 * d * d},
        "spectrum": {"key statistics": 4 * d * d, "eigenvectors": 8 * d * d},
        "nothing": {},
    }[shape.derived]
    # The first time, a moment is unpacked to float64 and factored in its place; an eigenvalue solver needs more room.
    making = {"factor": 8 * d * d, "spectrum": 8 * 5 * d * d, "nothing": 0}[shape.derived]
    # A Cholesky factorisation takes d^3 / 3, an eigenvalue problem about 9 d^3; each once for a layer.
    thirds = {"factor": 1, "spectrum": 27, "nothing": 0}[shape.derived]
    operations = 2 * (thirds * d**3 // 3 + n * d * d + system**3)
    work = Work(operations=operations * len(shape.layers))
    return Need("solve", {**mapped, "making of it": making, **parts}, mapped=tuple(mapped), work=work)
