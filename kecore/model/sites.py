"""Sites: names of places inside a model.

A site is a value: ``Output(3)`` is the hidden state behind layer 3 of whichever model is run, which a pass can hand out
or change, and ``SiteId(3)`` names the matrix of layer 3 that maps keys to values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor, nn
from typing_extensions import Self

__all__ = [
    "Beside",
    "Key",
    "ModuleInput",
    "ModuleOutput",
    "Output",
    "Patch",
    "Routed",
    "Site",
    "SiteId",
    "Start",
    "Value",
]


@dataclass(frozen=True, slots=True, order=True)
class SiteId:
    """The name of a place where a key is mapped to a value: key of statistics, updates, state and caches.

    In files it is written ``5``, or ``5.3`` for an expert.

    Args:
        layer: index of the layer.
        expert: index of the expert; None in a layer that has one such place. Shared experts come behind those that
            tokens are routed to.
    """

    layer: int
    expert: int | None = None

    def __str__(self) -> str:
        return f"{self.layer}" if self.expert is None else f"{self.layer}.{self.expert}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a name as ``str`` writes it.

        Raises:
            ValueError: the text is no such name.
        """
        layer, dot, expert = text.partition(".")
        return cls(int(layer), int(expert) if dot else None)


@dataclass(frozen=True, slots=True)
class Output:
    """The hidden state that a layer hands on, ``[rows, width, d_model]``."""

    layer: int


@dataclass(frozen=True, slots=True)
class Key:
    """The input of a layer's block (the value projection, or the mixture of experts), ``[rows, width, d_in]``."""

    layer: int


@dataclass(frozen=True, slots=True)
class Value:
    """The output of a layer's block, ``[rows, width, d_model]``."""

    layer: int


@dataclass(frozen=True, slots=True)
class Routed:
    """What a layer's experts are called with, ``[rows, width, n]``.

    Args:
        layer: index of the layer.
        what: the states that they read, ``n = d_model``; the ``n = k`` experts of each token; or their routing weights.
    """

    layer: int
    what: Literal["states", "experts", "weights"]


@dataclass(frozen=True, slots=True)
class ModuleOutput:
    """The output of any module of the model, which must be a state of the tokens, ``[rows, width, n]``."""

    module: nn.Module


@dataclass(frozen=True, slots=True)
class ModuleInput:
    """The first input of any module of the model, which must be a state of the tokens, ``[rows, width, n]``."""

    module: nn.Module


Site: TypeAlias = Output | Key | Value | ModuleOutput | ModuleInput | Routed


@dataclass(frozen=True, slots=True, eq=False)
class Beside:
    """A patch that acts beside a value projection: what it makes of the key is added to the value.

    Args:
        change: a matrix ``[d_out, d_in]`` (differentiable, unlike an overlay), or a function of the keys
            ``[rows, width, d_in]`` that returns ``[rows, width, d_out]``.
    """

    change: Tensor | Callable[[Tensor], Tensor]


Patch: TypeAlias = Callable[[Tensor], Tensor] | Beside
"""A function from what stands at a site to what shall stand there, both ``[rows, width, n]``, or :class:`Beside`."""


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """Where a pass begins that leaves out the layers below.

    Args:
        layer: the first layer that runs.
        hidden: ``[rows, width, d_model]``, the output of the layer before, which is fed to it.
    """

    layer: int
    hidden: Tensor
