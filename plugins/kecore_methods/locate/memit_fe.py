"""MEMIT-FE: values of the first edited layer, whose effect on the later ones is what those have to write."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from kecore.api.errors import LayerError
from kecore.engine.closed_form import ClosedForm
from kecore.engine.keys import Keys, Prompts
from kecore.engine.spread import Residuals, Spread
from kecore.model import Output, SiteId, Value
from kecore_methods import hparams
from kecore_methods.hparams import HparamsTable
from kecore_methods.locate.memit import LeastSquares

__all__ = ["ForwardReplay", "MemitFE", "replayed_targets"]


class ForwardReplay(Spread):
    """The values of the first edited layer, carried forward, are the targets of those behind it.

    arXiv 2605.00358: instead of a share of one residual, each layer writes what is missing to the output that it
    would have had if the first layer had written its values exactly. Nothing is missing where it has.
    """

    def anchor(self, part: tuple[int, ...]) -> int:
        """Return the first layer of a part."""
        return part[0]

    def residuals(self, prompts: Prompts, part: tuple[int, ...], delta: Tensor) -> Residuals:
        """Work out the target of each layer; see the base and :func:`replayed_targets`."""
        return _TargetResiduals(prompts, replayed_targets(prompts, part, delta))

    def share(self, site: SiteId, keys: Keys, missing: Tensor, remaining: int) -> Tensor:
        """Return all that is missing to the layer's own target."""
        return missing


@torch.no_grad()
def replayed_targets(prompts: Prompts, layers: tuple[int, ...], delta: Tensor) -> dict[int, Tensor]:
    """Run the unedited model with the first layer's values in place, and read what the later layers give.

    Args:
        prompts: the prompts of the batch.
        layers: edited layers, ascending.
        delta: ``[u, d_model]``, to be added to what the first layer's value projection gives.

    Returns:
        By layer ``[u, d_model]``, in units of its value projection.

    Raises:
        LayerError: there are several layers, and a norm stands behind the feed-forward block of one.
    """
    view, later = prompts.view, list(layers[1:])
    first = prompts.begin_pass((layers[0],))
    targets = {layers[0]: first.original + delta}
    if not later:
        return targets
    # A row that several groups share carries the mean of their values.
    added = (first.weight.t() @ delta) / first.weight.sum(0).to_dense()[:, None]  # [rows, d_model]
    carried = {layer: torch.empty(len(added), view.width) for layer in later}
    for chunk in first.chunks:
        chunk_added = added[chunk.index]

        def add_value(output: Tensor, chunk_added: Tensor = chunk_added) -> Tensor:
            output = output.clone()
            output[:, -1] += chunk_added.to(output)  # the last token is the subject's
            return output

        out = view.run(chunk.rows, taps=map(Output, later), patches={Value(layers[0]): add_value}, last=later[-1])
        for layer in later:
            scale = view.layers[layer].residual_scale
            if scale is None:
                raise LayerError(f"layer {layer} has a norm behind its feed-forward block; edit one layer only")
            carried[layer][chunk.index] = out[Output(layer)][:, -1].float().cpu() / scale
    return targets | {layer: first.weight @ rows for layer, rows in carried.items()}


class _TargetResiduals(Residuals):
    """Read what each layer lacks of its own target."""

    def __init__(self, prompts: Prompts, targets: dict[int, Tensor]) -> None:
        self._prompts, self._targets = prompts, targets

    @torch.no_grad()
    def read(self, layer: int) -> tuple[Keys, Tensor]:
        """Return the keys of a layer, and what it lacks of its target."""
        layer_pass = self._prompts.begin_pass((layer,))
        keys, _ = layer_pass.advance(layer)
        return keys, self._targets[layer] - layer_pass.original


class MemitFE(LeastSquares):
    """MEMIT with forward replay in place of the backward spread: see :class:`ForwardReplay`."""

    class Config(LeastSquares.Config):
        """Configuration of MEMIT-FE."""

        preset_file: ClassVar[str] = "memit-fe"
        hparams_table: ClassVar[HparamsTable | None] = hparams.MEMIT_FE

        def engine(self, layers: tuple[int, ...], **choices: Any) -> ClosedForm:
            """Return the engine with targets from the first layer."""
            return super().engine(layers, **{"spread": ForwardReplay(), **choices})

    name = "memit-fe"
    reference = (
        "Liu et al., From Backward Spreading to Forward Replay: Revisiting Target Construction in LLM Parameter "
        "Editing, ICML 2026, arXiv:2605.00358"
    )
