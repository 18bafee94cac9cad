"""Finding what a layer adds to the residual stream beside its feed-forward block: the attention's output.

Only methods that change it ask for it, so it is looked for when they do, again by perturbation and not by name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kecore.api.errors import UnsupportedModelError
from kecore.model import hooks
from kecore.model.verify import BROKEN, probe_ids
from kecore.model.view import ModelView, Pass
from kecore.text import Rows

__all__ = ["mixer"]

_PLACE = 3  # the token whose vector is changed
_LENGTH = 4.0  # of the change, in units of the hidden state: what is linear is so at any length


def mixer(view: ModelView, layer: int) -> nn.Module:
    """The outermost module whose output enters the residual stream of a layer and does not come from its FFN.

    With the value projection's output held fast, a vector added to that module's output at one token changes the
    layer's output there by a multiple of the vector, and nowhere else.

    Raises:
        UnsupportedModelError: there is none, as where a norm stands behind the sum of both.
    """
    part = view.layers[layer]
    projection = part.value_projection.module
    inner = [m for m in part.module.modules() if m is not part.module and projection not in set(m.modules())]
    ids = probe_ids(view.model)
    rows = Rows(ids, torch.ones_like(ids), torch.zeros(1, dtype=torch.long))
    with view.frozen(), torch.no_grad():
        plain = view.forward(rows, stop=layer, hidden=[layer], values=[layer])
        for module in inner:
            try:
                if _enters(view, layer, rows, plain, module):
                    return module
            except BROKEN:  # it is not called, or what it returns is not a state of the tokens
                continue
    raise UnsupportedModelError(
        f"layer {layer} of {type(view.model).__name__} has no module beside its feed-forward block whose output enters "
        "the residual stream unchanged; use a method that needs only the feed-forward block, such as memit"
    )


def _enters(view: ModelView, layer: int, rows: Rows, plain: Pass, module: nn.Module) -> bool:
    before, value = plain.hidden[layer], plain.values[layer]
    noise = torch.randn(view.width, generator=torch.Generator().manual_seed(0))
    bump = torch.zeros_like(before)
    bump[0, _PLACE] = (noise * _LENGTH * before[0, _PLACE].float().norm().cpu() / noise.norm()).to(bump)
    if not torch.equal(*(_output(view, layer, rows, module, lambda x, by=by: x + by) for by in (0, bump))):
        return False  # it reads what the value projection writes
    change: dict[int | nn.Module, Callable[[Tensor], Tensor]] = {layer: lambda _: value, module: lambda x: x + bump}
    moved = view.forward(rows, stop=layer, hidden=[layer], change=change).hidden[layer] - before
    moved, bump = moved.float(), bump.float()
    scale = (moved * bump).sum() / bump.square().sum()
    loose = max(1e-3, 8 * torch.finfo(before.dtype).eps)
    return float(scale.abs()) > loose and float((moved - scale * bump).norm()) < loose * float((scale * bump).norm())


def _output(view: ModelView, layer: int, rows: Rows, module: nn.Module, change: Callable[[Tensor], Tensor]) -> Tensor:
    """What a module returns with the value projection's output changed."""
    with hooks.capture([module]) as found:
        view.forward(rows, stop=layer, change={layer: change})
    return found[0]
