"""A mixture of experts written anew as loops over ordinary matrices: the oracle of tests about experts.

Nothing here uses what the probe found: the routing comes from the model's own router, and each expert's key is made by
hand from its first matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class RewrittenToken:
    """What the experts do to one token.

    Args:
        keys: expert to its weighted key ``[d_in]``.
        weights: expert to its routing weight.
        output: ``[d_model]``, the weighted sum of the experts' outputs.
    """

    keys: dict[int, Tensor]
    weights: dict[int, float]
    output: Tensor


@torch.no_grad()
def rewritten(layer: nn.Module, states: Tensor) -> list[RewrittenToken]:
    """Apply the experts of a Mixtral-, OLMoE- or gpt-oss-like layer to ``[tokens, d_model]``, one by one."""
    block: Any = layer.get_submodule("mlp")
    router = block.router if hasattr(block, "router") else block.gate
    _, weights, chosen = router(states)  # [tokens, k] each
    tokens: list[RewrittenToken] = []
    for token in range(len(states)):
        keys: dict[int, Tensor] = {}
        output = torch.zeros(states.shape[1])
        for weight, expert in zip(weights[token], chosen[token].tolist(), strict=True):
            key, matrix, bias = expert_parts(block.experts, expert, states[token])
            keys[expert] = weight * key
            output = output + weight * (matrix @ key + bias)
        routing = dict(zip(chosen[token].tolist(), weights[token].tolist(), strict=True))
        tokens.append(RewrittenToken(keys, routing, output))
    return tokens


def expert_parts(experts: Any, expert: int, state: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
    """Return the key ``[d_in]``, the last matrix ``[d_out, d_in]`` and the bias of one expert for one state."""
    first, last = experts.gate_up_proj[expert], experts.down_proj[expert]
    if hasattr(experts, "down_proj_bias"):  # gpt-oss: stored transposed, interleaved, clamped
        both = state @ first + experts.gate_up_proj_bias[expert]
        gate, up = both[::2].clamp(max=experts.limit), both[1::2].clamp(-experts.limit, experts.limit)
        return (up + 1) * gate * torch.sigmoid(gate * experts.alpha), last.t(), experts.down_proj_bias[expert]
    gate, up = (first @ state).chunk(2)
    return experts.act_fn(gate) * up, last, 0.0
