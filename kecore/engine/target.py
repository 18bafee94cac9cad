"""What is done to optimised values before they are written."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Target", "as_found", "norm_anchored"]

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
