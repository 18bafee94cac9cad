"""Finding what a layer adds to the residual stream beside its feed-forward block: the attention's output.

Only methods that change it ask for it, so it is looked for when they do, again by perturbation and not by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kecore.api.errors import UnsupportedModelError
from kecore.model.sites import ModuleOutput, Output, Patch, Site, Value
from kecore.model.verify import BROKEN, probe_ids
from kecore.text import Rows

if TYPE_CHECKING:
    from kecore.model.view import ModelView, Pass

__all__ = ["mixer"]

_COLUMN = 3  # of the token whose vector is changed
_LENGTH = 4.0  # of the change, in units of the hidden state: what is linear is so at any length


def mixer(view: ModelView, layer: int) -> nn.Module:
    """Return the outermost module whose output enters a layer's residual stream and does not come from its FFN.

    With the value projection's output held fast, a vector added to that module's output at one token changes the
    layer's output there by a multiple of the vector, and nowhere else.

    Raises:
        UnsupportedModelError: there is none, as where a norm stands behind the sum of both.
    """
    layer_module = view.layers[layer].module
    projection = view.layers[layer].block.module
    candidates: list[nn.Module] = []  # outer modules come before those inside them
    for module in layer_module.modules():
        if module is not layer_module and projection not in set(module.modules()):
            candidates.append(module)
    ids = probe_ids(view.model)
    rows = Rows(ids, torch.ones_like(ids), torch.zeros(1, dtype=torch.long))
    with view.frozen(), torch.no_grad():
        unchanged = view.run(rows, taps=[Output(layer), Value(layer)], last=layer)
        for module in candidates:
            try:
                if _enters_stream(view, layer, rows, unchanged, module):
                    return module
            except BROKEN:  # it is not called, or what it returns is not a state of the tokens
                continue
    raise UnsupportedModelError(
        f"layer {layer} of {type(view.model).__name__} has no module beside its feed-forward block whose output enters "
        "the residual stream unchanged; use a method that needs only the feed-forward block, such as memit"
    )


def _enters_stream(view: ModelView, layer: int, rows: Rows, unchanged: Pass, module: nn.Module) -> bool:
    """Return whether the module's output enters the layer's output, and does not come from the value projection."""
    hidden, value = unchanged[Output(layer)], unchanged[Value(layer)]  # [1, tokens, d_model] each
    noise = torch.randn(view.width, generator=torch.Generator().manual_seed(0))
    length = _LENGTH * hidden[0, _COLUMN].float().norm().cpu()
    bump = torch.zeros_like(hidden)
    bump[0, _COLUMN] = (noise * length / noise.norm()).to(bump)

    def add_bump(output: Tensor) -> Tensor:
        return output + bump

    plain_output = _module_output(view, layer, rows, module, lambda output: output)
    bumped_output = _module_output(view, layer, rows, module, add_bump)
    if not torch.equal(plain_output, bumped_output):
        return False  # the module reads what the value projection writes
    patches: dict[Site, Patch] = {Value(layer): lambda _: value, ModuleOutput(module): add_bump}
    changed = view.run(rows, taps=[Output(layer)], patches=patches, last=layer)[Output(layer)]
    moved, bump = (changed - hidden).float(), bump.float()  # [1, tokens, d_model] each
    scale = (moved * bump).sum() / bump.square().sum()
    tolerance = max(1e-3, 8 * torch.finfo(hidden.dtype).eps)
    if float(scale.abs()) <= tolerance:
        return False
    return float((moved - scale * bump).norm()) < tolerance * float((scale * bump).norm())


def _module_output(
    view: ModelView, layer: int, rows: Rows, module: nn.Module, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return what a module returns when the value projection's output is changed."""
    site = ModuleOutput(module)
    return view.run(rows, taps=[site], patches={Value(layer): change}, last=layer)[site]
