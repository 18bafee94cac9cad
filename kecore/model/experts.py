"""The experts of one layer: matrices that one parameter stacks, of which each token uses a few.

A mixture of experts is a dense layer of which most of the key is zero. Its output at a token is ``Σ w_e W_e k_e`` over
the experts that the token is routed to; with the *weighted* keys ``κ_e = w_e k_e``, and ``κ_e = 0`` for all others,
that is ``[W_1 ... W_E] [κ_1; ...; κ_E]``. So a change ``Δ`` of one expert's matrix changes the output by ``Δ κ_e``, and
keys, second moments and updates of an expert mean what they mean in a dense layer.

How an expert makes its key is nowhere asked: with the identity in place of its last matrix, it returns the key itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kecore.model import hooks
from kecore.model.linear import LinearView, MatrixName

__all__ = ["ExpertsView", "Routing"]

Argument = Literal["states", "experts", "weights"]
"""What a module of experts is called with."""


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """Which experts some tokens use.

    Args:
        states: ``[n, d]``, what the experts read.
        experts: ``[n, k]``, the experts of each token.
        weights: ``[n, k]``, how much of each expert's output counts.
    """

    states: Tensor
    experts: Tensor
    weights: Tensor

    def at(self, index: Tensor) -> Routing:
        """Return the routing of some of the tokens."""
        return Routing(self.states[index], self.experts[index], self.weights[index])


@dataclass(frozen=True, slots=True, eq=False)
class ExpertsView:
    """The experts that the tokens of one layer are routed to.

    Args:
        module: the module that applies the experts.
        name: module path.
        positions: where each argument stands in a call of the module, or its name there.
        attribute: name of the parameter that stacks the experts' last matrices.
        transposed: it is stored ``[experts, d_in, d_out]``.
        bias: name of the parameter that is added behind these matrices; None where there is none.
        top_k: experts that a token uses.
        scale: ``c`` where adding ``v`` to the module's output adds ``c v`` to the output of the layer's block.
    """

    module: nn.Module
    name: str
    positions: Mapping[Argument, int | str]
    attribute: str
    transposed: bool
    bias: str | None
    top_k: int
    scale: float = 1.0

    @property
    def parameter(self) -> nn.Parameter:
        """The experts' last matrices, as they are stored."""
        return getattr(self.module, self.attribute)

    @property
    def count(self) -> int:
        """How many experts there are."""
        return int(self.parameter.shape[0])

    @property
    def d_in(self) -> int:
        """Width of the keys."""
        return int(self.parameter.shape[1 if self.transposed else 2])

    @property
    def d_out(self) -> int:
        """Width of the values."""
        return int(self.parameter.shape[2 if self.transposed else 1])

    def linear(self, expert: int) -> LinearView:
        """Return the last matrix of one expert."""
        name = str(MatrixName(f"{self.name}.{self.attribute}", expert))
        return LinearView(self.module, name, self.transposed, self.attribute)

    def call(self, routing: Routing) -> Tensor:
        """Return what the experts give for some tokens, ``[n, d_out]``."""
        values: dict[Argument, Tensor] = {
            "states": routing.states,
            "experts": routing.experts,
            "weights": routing.weights,
        }
        by_position: dict[int, Tensor] = {}
        by_name: dict[str, Tensor] = {}
        for argument, position in self.positions.items():
            if isinstance(position, int):
                by_position[position] = values[argument]
            else:
                by_name[position] = values[argument]
        output = self.module(*[by_position[position] for position in sorted(by_position)], **by_name)
        return hooks.first_tensor(output)

    @torch.no_grad()
    def keys(self, routing: Routing) -> Tensor:
        """Return the weighted keys of some tokens' experts, ``[n, k, d_in]`` float32, in the order of the routing.

        A change ``Δ`` of an expert's matrix changes the output of the layer's block by ``Δ`` times this key.
        """
        tokens, k = routing.experts.shape
        is_expert = (routing.experts >= 0) & (routing.experts < self.count)  # others stand for "no expert"
        one_each = Routing(
            routing.states.repeat_interleave(k, 0),  # [n k, d]
            routing.experts.where(is_expert, 0).reshape(-1, 1),  # [n k, 1]
            torch.ones_like(routing.weights).reshape(-1, 1),
        )
        keys = self._matrix_inputs(one_each).reshape(tokens, k, self.d_in).float()
        weights = self.scale * routing.weights.float().where(is_expert, 0)  # [n, k]
        return keys * weights[..., None].to(keys.device)

    def _matrix_inputs(self, routing: Routing) -> Tensor:
        """Return what the matrices read, ``[n, d_in]``, of tokens that use one expert each."""
        parts: list[Tensor] = []
        overlay: dict[nn.Parameter, Tensor] = {}
        if self.bias is not None:
            bias = getattr(self.module, self.bias)
            overlay[bias] = torch.zeros_like(bias)
        data = self.parameter.data
        for begin in range(0, self.d_in, self.d_out):  # the module returns d_out numbers at a time
            end = min(self.d_in, begin + self.d_out)
            selection = torch.zeros(self.d_out, self.d_in, dtype=data.dtype, device=data.device)
            selection[torch.arange(end - begin), torch.arange(begin, end)] = 1
            stored = selection.t() if self.transposed else selection
            overlay[self.parameter] = stored.expand(data.shape)  # one matrix stands for those of all experts
            with hooks.overlaid(overlay), _one_by_one(self.module):
                parts.append(self.call(routing)[:, : end - begin])
        return torch.cat(parts, 1)


@contextmanager
def _one_by_one(module: nn.Module) -> Iterator[None]:
    """Let a module apply its experts one after the other: kernels for all at once need matrices laid out as stored."""
    config: Any = getattr(module, "config", None)
    implementation = getattr(config, "_experts_implementation", None)
    if implementation is None:
        yield
        return
    config._experts_implementation = "eager"
    try:
        yield
    finally:
        config._experts_implementation = implementation
