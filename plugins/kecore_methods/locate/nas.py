"""NAS: AlphaEdit, whose values are as long as the unedited model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kecore.api.config import StageSettings
from kecore.engine.closed_form import ClosedForm
from kecore.engine.target import Target
from kecore_methods.locate.alphaedit import AlphaEdit

__all__ = ["Nas", "NormAnchor", "norm_anchored"]

_LONGEST = 20  # one value in so many is left out of the anchor


class Nas(AlphaEdit):
    """Norm-Anchor Scaling on AlphaEdit's solve, as released: see :func:`norm_anchored`."""

    class Config(AlphaEdit.Config):
        """Configuration of NAS."""

        preset_file: ClassVar[str] = "nas"
        own_stages: ClassVar[tuple[str, ...]] = ("nas",)

    name = "nas"
    reference = "Liu et al., Norm Anchors Make Model Edits Last, 2026, arXiv:2602.02543"


class NormAnchor:
    """Give every value the length that the unedited model's have."""

    class Settings(StageSettings):
        """Settings of the stage."""

        anchor: float | None = Field(
            default=None,
            gt=0,
            description="Length of a value; None takes the mean length of the values of the session's first edit, "
            "without the longest twentieth.",
        )
        longest: float | None = Field(
            default=None,
            gt=1,
            description="A value of more than so many anchors is not written at all (2 in the release); None "
            "writes it, at the anchor's length.",
        )

    name = "nas"
    reference = Nas.reference
    api = (1, 1)

    def apply(self, form: ClosedForm, settings: NormAnchor.Settings) -> ClosedForm:
        """Return the form with this stage in it."""
        return form.with_target(norm_anchored(settings.anchor, settings.longest))


def norm_anchored(anchor: float | None = None, longest: float | None = None) -> Target:
    """Return NAS's target: every value is made as long as those of the unedited model (arXiv 2602.02543).

    A value ``v`` is the projection's output with ``delta`` on it, and becomes ``a v / ‖v‖``. The anchor ``a`` is the
    mean length of values that were found on the unedited model, without the longest twentieth (as in the authors'
    release).

    Args:
        anchor: ``a``, in units of the projection's output; None takes it from the values of the session's first edit at
            the same layer.
        longest: a value of more than so many anchors is not written; None writes all.
    """

    def target(layer: int, outputs: Callable[[], Tensor], delta: Tensor, state: dict[str, Tensor]) -> Tensor:
        name = f"nas/anchor/{layer}"
        output = outputs().to(delta)  # [u, d_model]
        value = output + delta
        length = value.norm(dim=1)  # [u]
        if anchor is not None:
            state[name] = torch.tensor(anchor)
        elif name not in state:
            shorter = len(length) - len(length) // _LONGEST
            state[name] = length.sort().values[:shorter].mean()
        scale = state[name].to(value) / length  # [u]
        scaled = value * scale[:, None] - output
        if longest is None:
            return scaled
        return scaled * (scale * longest >= 1)[:, None]

    return target
