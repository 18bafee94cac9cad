"""What is done to optimised values before they are written, and what they ask of layers above their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kecore.api.errors import LayerError
from kecore.engine.keys import KeyPass, Keys
from kecore.model import ModelView

__all__ = ["ForwardReplay", "Target", "as_found", "norm_anchored"]

_LONGEST = 20  # one value in so many is left out of the anchor

Target = Callable[[int, Callable[[], Tensor], Tensor, dict[str, Tensor]], Tensor]
"""``target(layer, outputs, delta, state)`` to another ``delta [u, d_model]``: ``layer`` is the one that the values are
for, ``outputs()`` gives what its value projection gives now, ``[u, d_model]``, and ``state`` survives to the next edit
of the sequence."""


def as_found(_layer: int, _outputs: Callable[[], Tensor], delta: Tensor, _state: dict[str, Tensor]) -> Tensor:
    """The values as they were optimised."""
    return delta


def norm_anchored(anchor: float | None = None) -> Target:
    """NAS: every value is as long as values of the unedited model are (arXiv 2602.02543).

    A value ``v`` is the projection's output with ``delta`` on it, and becomes ``a v / ‖v‖``. The anchor ``a`` is the
    mean length of values that were found on the unedited model, without the longest twentieth (as in the authors'
    release).

    Args:
        anchor: ``a``, in units of the projection's output; None takes it from the values of the session's first edit at
            the same layer.
    """

    def target(layer: int, outputs: Callable[[], Tensor], delta: Tensor, state: dict[str, Tensor]) -> Tensor:
        now, name = outputs().to(delta), f"nas/anchor/{layer}"
        value = now + delta
        length = value.norm(dim=1)
        if anchor is not None:
            state[name] = torch.tensor(anchor)
        elif name not in state:
            state[name] = length.sort().values[: len(length) - len(length) // _LONGEST].mean()
        return value * (state[name].to(value) / length)[:, None] - now

    return target


class ForwardReplay:
    """MEMIT-FE: the values of the first edited layer, carried forward, are the targets of those behind it.

    arXiv 2605.00358: instead of a share of one residual, each layer writes what is missing to the output that it
    would have had if the first layer had written its values exactly. Nothing is missing where it has.

    Args:
        view: the unedited model, frozen by the caller.
        passes: from layers to a pass over the prompts, see :class:`~kecore.engine.keys.KeyPass`.
        layers: edited layers, ascending.
        delta: ``[u, d_model]``, to be added to what the first layer's value projection gives.

    Raises:
        LayerError: there are several layers, and a norm stands behind the feed-forward block of one.
    """

    def __init__(
        self, view: ModelView, passes: Callable[[tuple[int, ...]], KeyPass], layers: Sequence[int], delta: Tensor
    ) -> None:
        self._passes = passes
        first, later = passes((layers[0],)), list(layers[1:])
        self.targets = {layers[0]: first.original + delta}
        if not later:
            return
        # A row that several groups share carries the mean of their values.
        added = (first.weight.t() @ delta) / first.weight.sum(0).to_dense()[:, None]
        carried = {layer: torch.empty(len(added), view.width) for layer in later}
        for index, rows, _ in first.chunks:
            own = added[index]

            def change(output: Tensor, own: Tensor = own) -> Tensor:
                output = output.clone()
                output[:, -1] += own.to(output)
                return output

            out = view.forward(rows, stop=later[-1], hidden=later, change={layers[0]: change})
            for layer in later:
                scale = view.layers[layer].residual_scale
                if scale is None:
                    raise LayerError(f"layer {layer} has a norm behind its feed-forward block; edit one layer only")
                carried[layer][index] = out.hidden[layer][:, -1].float().cpu() / scale
        self.targets |= {layer: first.weight @ rows for layer, rows in carried.items()}

    @torch.no_grad()
    def advance(self, layer: int) -> tuple[Keys, Tensor]:
        """One layer under the updates in place; call it for each in ascending order.

        Returns:
            Its keys, and ``[u, d_model]``: what is missing to its target, in units of its value projection.
        """
        now = self._passes((layer,))
        keys, _ = now.advance(layer)
        return keys, self.targets[layer] - now.original
