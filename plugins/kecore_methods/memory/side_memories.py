"""WISE's side memories: changes of one value projection, merged by TIES, and what routes each token to one of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kecore.edit import SideModule
from kecore.engine.passes import Passes, hook_projection

__all__ = ["SideMemories", "ties"]


def ties(vectors: Tensor, density: float) -> Tensor:
    """Merge changes by TIES (arXiv 2306.01708, Algorithm 1): trim, elect signs, take the mean of those that agree.

    Args:
        vectors: ``[n, ...]`` changes of one weight.
        density: share of the entries of each that stays, the largest in magnitude.

    Returns:
        The merged change, without the first dimension.
    """
    flat = vectors.flatten(1)  # [n, entries]
    count = max(1, round(density * flat.shape[1]))
    largest = flat.abs().topk(count, dim=1).indices  # [n, count]
    trimmed = torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest))
    sign = trimmed.sum(0).sign()  # [entries], the sign with the larger total
    agrees = (trimmed.sign() == sign) & (sign != 0)  # [n, entries]
    total = (trimmed * agrees).sum(0)
    return (total / agrees.sum(0).clamp(min=1)).reshape(vectors.shape[1:])


class SideMemories(SideModule):
    """Changes of one value projection with their thresholds (arXiv 2405.14768, eq. 3 and 6, Algorithm 2).

    The query of a token is the text up to it. A memory's activation for it is the largest
    ``‖a (W' - W)‖`` of the tokens so far, relative to the memory's threshold. The memory with the largest one takes
    the token, if that is above 1, and else the layer is the model's own, bit for bit. A text that a memory has taken
    is not given back to the model's own weights, since the largest activation only grows; so what a prompt decided
    holds for all that is written after it.

    Args:
        place: module path of the value projection.
        memories: number of memories.
        d_out: width of the projection's output.
        d_in: width of its keys.
    """

    deltas: Tensor
    thresholds: Tensor

    def __init__(self, place: str, memories: int, d_out: int, d_in: int) -> None:
        super().__init__()
        self.place = place
        self.register_buffer("deltas", torch.zeros(memories, d_out, d_in))
        self.register_buffer("thresholds", torch.ones(memories))

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the class."""
        memories, d_out, d_in = self.deltas.shape
        return {"place": self.place, "memories": memories, "d_out": d_out, "d_in": d_in}

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Act on the output of the value projection."""
        return hook_projection(model, self.place, self._act)

    def _act(self, keys: Tensor, out: Tensor, mask: Tensor, passes: Passes) -> Tensor:
        deltas = self.deltas.to(keys.device)
        changes = torch.einsum("rti,moi->rtmo", keys, deltas)  # [rows, width, memories, d_out]
        memory = self.route(changes.norm(dim=-1), mask, passes)  # [rows, width]
        index = memory.clamp(min=0)[..., None, None].expand(*memory.shape, 1, changes.shape[-1])
        change = changes.gather(2, index).squeeze(2)  # [rows, width, d_out], of the token's memory
        edited = (out.float() + change).to(out.dtype)
        return torch.where((memory >= 0).unsqueeze(-1), edited, out)

    def route(self, activation: Tensor, mask: Tensor, passes: Passes) -> Tensor:
        """Return which memory takes each token, ``[rows, width]``; -1 for none.

        Args:
            activation: ``‖a (W' - W)‖`` of each memory, ``[rows, width, memories]``.
            mask: ``[rows, width]`` real tokens.
            passes: remembers what earlier passes over the same cache decided.
        """
        score = activation / self.thresholds.to(activation) * mask.unsqueeze(-1)  # [rows, width, memories]
        earlier_score = passes.text_state.get("score")  # [rows, memories]
        if earlier_score is not None:
            score = torch.cat([earlier_score.to(score)[:, None], score], 1)
        # The query of a token is the text up to it: the largest score so far counts.
        running = score.cummax(1).values[:, -mask.shape[1] :]
        passes.text_state["score"] = running[:, -1]
        best, memory = running.max(-1)
        return torch.where(best > 1, memory, -1)
