"""Reading a mixture of experts by structure, from one recorded pass and by trying what its matrices do.

Nothing here knows an architecture. The block is the outermost module of a layer that holds the stacked matrices and
returns a state of the tokens; the experts are the module inside it that is called with states, with the experts of each
token and with their weights; their last matrices are the parameter with which the module's output can be recomputed
from the keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kecore.model import hooks
from kecore.model.experts import Argument, ExpertsView, Routing
from kecore.model.layer import BlockView
from kecore.model.verify import BROKEN

__all__ = ["Mixture", "ModuleCall", "read_mixture"]

_CLOSE = 2e-3  # relative, in float32: rounding of the output, or of products where TF32 is on


@dataclass(frozen=True, slots=True, eq=False)
class ModuleCall:
    """One call of a module.

    Args:
        args: what it was called with, by position.
        kwargs: and by name.
        output: what it returned.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any

    def named_arguments(self) -> list[tuple[int | str, Any]]:
        """Return all arguments with their position or name."""
        return [*enumerate(self.args), *self.kwargs.items()]


@dataclass(frozen=True, slots=True)
class Mixture:
    """What was found in a layer that keeps its values in several matrices.

    Args:
        block: the module whose output enters the residual stream; None if there is none.
        experts: the experts inside it; None where they cannot be edited.
        reason: why they cannot; empty if they can.
    """

    block: BlockView | None
    experts: ExpertsView | None
    reason: str = ""


def read_mixture(
    layer_name: str, modules: Mapping[str, nn.Module], calls: Mapping[nn.Module, Sequence[ModuleCall]], width: int
) -> Mixture:
    """Read the block and the experts of one layer.

    Args:
        layer_name: module path of the layer.
        modules: by path inside the layer, the modules that hold some of the matrices, outer ones first.
        calls: what each module was called with in one pass.
        width: width of the residual stream.
    """
    block = _find_block(layer_name, modules, calls, width)
    if block is None:
        return Mixture(None, None, "no module around them returns one vector of the residual width for each token")
    reasons: list[str] = []
    for path, module in modules.items():
        if not _stacked_names(module):
            continue
        experts, reason = _read_experts(f"{layer_name}.{path}", module, calls.get(module, ()))
        if experts is not None:
            return Mixture(block, experts)
        reasons.append(f"{path}: {reason}")
    return Mixture(block, None, "; ".join(reasons) or "no parameter stacks them")


def _find_block(
    layer_name: str, modules: Mapping[str, nn.Module], calls: Mapping[nn.Module, Sequence[ModuleCall]], width: int
) -> BlockView | None:
    """Return the outermost module that maps a vector of each token to one of the residual width."""
    for path, module in modules.items():
        module_calls = calls.get(module, ())
        if len(module_calls) != 1:
            continue
        call = module_calls[0]
        states = next((value for _, value in call.named_arguments()), None)
        if not isinstance(states, Tensor) or not _is_state(call.output):
            continue
        value = hooks.first_tensor(call.output)
        tokens = states.numel() // states.shape[-1]
        if states.is_floating_point() and value.shape[-1] == width and value.numel() == tokens * width:
            return BlockView(module, f"{layer_name}.{path}", d_in=int(states.shape[-1]), d_out=width)
    return None


def _is_state(output: Any) -> bool:
    """Return whether a module's output is a tensor, or begins with one."""
    if isinstance(output, tuple | list):
        return len(output) > 0 and isinstance(output[0], Tensor)
    return isinstance(output, Tensor)


def _stacked_names(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters that stack several matrices."""
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]


def _read_experts(name: str, module: nn.Module, calls: Sequence[ModuleCall]) -> tuple[ExpertsView | None, str]:
    """Return the experts that a module applies, or why they cannot be edited."""
    if len(calls) != 1:
        return None, f"it runs {len(calls)} times in a pass, and an edit has to know which of them"
    positions, routing = _routing_of(calls[0])
    if routing is None:
        return None, "it is not called with the experts of each token and their weights, so its keys belong to no token"
    output = hooks.first_tensor(calls[0].output)
    if output.shape != routing.states.shape:
        return None, "it does not return one vector for each token"
    for experts in _candidates(name, module, positions, routing, output):
        try:
            if _recomputes(experts, routing, output):
                return experts, ""
        except BROKEN as error:
            return None, f"it cannot be called with one expert for each token ({type(error).__name__}: {error})"
    return None, (
        f"none of {', '.join(_stacked_names(module))} is a last matrix, of which the output is the weighted sum over "
        "experts (a norm or a function stands behind it, or it is quantised)"
    )


def _routing_of(call: ModuleCall) -> tuple[dict[Argument, int | str], Routing | None]:
    """Return where a call's arguments stand, and what they say; None where it has others."""
    positions: dict[Argument, int | str] = {}
    values: dict[Argument, Tensor] = {}
    for position, value in call.named_arguments():
        if not isinstance(value, Tensor) or value.ndim != 2:
            return positions, None
        if not value.is_floating_point():
            argument: Argument = "experts"
        elif "states" not in values:
            argument = "states"
        else:
            argument = "weights"
        if argument in values:
            return positions, None
        positions[argument], values[argument] = position, value
    if len(values) != 3 or values["experts"].shape != values["weights"].shape:
        return positions, None
    return positions, Routing(values["states"], values["experts"], values["weights"])


def _candidates(
    name: str, module: nn.Module, positions: Mapping[Argument, int | str], routing: Routing, output: Tensor
) -> Iterable[ExpertsView]:
    """Yield the ways in which a module may store its last matrices, to be tried out."""
    width = output.shape[-1]
    parameters = dict(module.named_parameters(recurse=False))
    stacked = _stacked_names(module)
    for attribute in reversed(stacked):  # the last matrix usually comes last
        shape = parameters[attribute].shape
        biases = [name for name, bias in parameters.items() if bias.shape == (shape[0], width)]
        for transposed in (False, True):
            if shape[2 if transposed else 1] != width or not parameters[attribute].is_floating_point():
                continue
            for bias in (None, *reversed(biases)):
                yield ExpertsView(
                    module, name, positions, attribute, transposed, bias, top_k=int(routing.experts.shape[1])
                )


def _recomputes(experts: ExpertsView, routing: Routing, output: Tensor) -> bool:
    """Return whether a module's output is the weighted sum of its experts' matrices times their keys."""
    keys = experts.keys(routing)  # [n, k, d_in]
    total = torch.zeros_like(output, dtype=torch.float32)  # [n, d_out]
    for token, chosen in enumerate(routing.experts.tolist()):
        for slot, expert in enumerate(chosen):
            if not 0 <= expert < experts.count:
                continue  # it stands for "no expert"
            total[token] += experts.linear(expert).weight.float() @ keys[token, slot]
            if experts.bias is not None:
                bias = getattr(experts.module, experts.bias).data[expert].float()  # [d_out]
                total[token] += bias * routing.weights[token, slot].float()
    error = float((total - output.float()).norm())
    close = max(_CLOSE, 8 * torch.finfo(output.dtype).eps)
    return error <= close * float(output.float().norm().clamp(min=torch.finfo(torch.float32).tiny))
