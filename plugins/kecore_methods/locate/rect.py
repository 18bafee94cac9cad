"""RECT: MEMIT, of whose updates only the largest relative changes stay."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field

from kecore.api.config import StageSettings
from kecore.edit import Dense, Update
from kecore.engine.closed_form import ClosedForm
from kecore.engine.post import EditedSite, Post
from kecore_methods.locate.memit import LeastSquares

__all__ = ["LargestChanges", "Rect", "largest_relative_changes"]


class Rect(LeastSquares):
    """RElative Change in weighT: see :func:`largest_relative_changes`."""

    class Config(LeastSquares.Config):
        """Configuration of RECT."""

        own_stages: ClassVar[tuple[str, ...]] = ("rect",)

    name = "rect"
    reference = (
        "Gu et al., Model Editing Harms General Abilities of Large Language Models: Regularization to the Rescue, "
        "EMNLP 2024, arXiv:2401.04700"
    )


class LargestChanges:
    """Keep the largest relative changes of each weight, and drop the rest."""

    class Settings(StageSettings):
        """Settings of the stage."""

        kept: float = Field(
            default=0.4, gt=0, le=1, description="Share of an update's entries that stay (RECT's top-k%)."
        )

    name = "rect"
    reference = Rect.reference
    api = (1, 1)

    def apply(self, form: ClosedForm, settings: LargestChanges.Settings) -> ClosedForm:
        """Return the form with this stage in it."""
        return form.with_post(largest_relative_changes(settings.kept))


def largest_relative_changes(kept: float) -> Post:
    """Return RECT's post: it drops the entries of an update that change their weight little, relative to its size.

    arXiv 2401.04700: of the entries of ``ΔW``, those with the largest ``|ΔW_ij / W_ij|`` hold the edit and
    keep their values; the rest is set to zero.

    Args:
        kept: share of the entries that stay, 0 to 1.
    """

    def post(site: EditedSite, update: Update) -> Update:
        delta = update.matrix()
        # Where both are zero nothing changes; where only the weight is, the change is infinite.
        change = (delta / site.weight.to(delta)).abs().nan_to_num(nan=0.0, posinf=math.inf).flatten()
        strongest = change.topk(max(1, round(kept * change.numel()))).indices
        chosen = torch.zeros_like(change, dtype=torch.bool).index_fill(0, strongest, True)
        return Dense(torch.where(chosen.reshape(delta.shape), delta, 0.0))

    return post
