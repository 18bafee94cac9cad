"""LayerView: one decoder layer as editing methods see it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from kecore.model.linear import LinearView

__all__ = ["LayerView"]


@dataclass(frozen=True, slots=True)
class LayerView:
    """One decoder layer.

    Args:
        index: position in the stack.
        name: module path.
        module: the layer.
        value_projection: the linear map whose input is the key and whose output enters the residual
            stream: the feed-forward block's last matrix.
        residual_scale: ``c`` where adding ``v`` to the projection's output adds ``c v`` to the layer's
            output; None where something (a norm after the block) stands between them.
        items: length of the tuple that the layer returns; 0 where it returns a bare tensor.
    """

    index: int
    name: str
    module: nn.Module
    value_projection: LinearView
    residual_scale: float | None
    items: int = 0
