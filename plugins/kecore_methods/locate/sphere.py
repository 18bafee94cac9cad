"""SPHERE: AlphaEdit, whose updates leave alone the directions that the weight's rows crowd around."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from kecore.api.config import StageSettings
from kecore.edit import Dense, LowRank, Update, factors_of
from kecore.engine.closed_form import ClosedForm
from kecore.engine.post import EditedSite, Post
from kecore_methods import hparams
from kecore_methods.hparams import HparamsTable
from kecore_methods.locate.alphaedit import AlphaEdit

__all__ = ["BesidesPrincipalDirections", "Sphere", "besides_principal_directions"]


class Sphere(AlphaEdit):
    """Sparse Projection for Hyperspherical Energy-Regularized Editing.

    See :func:`besides_principal_directions`.
    """

    class Config(AlphaEdit.Config):
        """Configuration of SPHERE."""

        preset_file: ClassVar[str] = "sphere"
        hparams_table: ClassVar[HparamsTable | None] = hparams.SPHERE
        own_stages: ClassVar[tuple[str, ...]] = ("sphere",)

    name = "sphere"
    reference = "Liu et al., Energy-Regularized Sequential Model Editing on Hyperspheres, ICLR 2026, arXiv:2510.01172"


class BesidesPrincipalDirections:
    """Leave alone the directions that the weight's rows crowd around."""

    class Settings(StageSettings):
        """Settings of the stage."""

        ratio: float = Field(
            default=0.5, ge=0, le=1, description="Share of the spectrum that is principal (0.5 in EasyEdit's set-ups)."
        )
        suppression: float = Field(
            default=0.5,
            ge=0,
            le=1,
            description="How much of the update along it goes, 1 for all (0.5 in EasyEdit's set-ups).",
        )

    name = "sphere"
    reference = Sphere.reference
    api = (1, 1)

    def apply(self, form: ClosedForm, settings: BesidesPrincipalDirections.Settings) -> ClosedForm:
        """Return the form with this stage in it."""
        return form.with_post(besides_principal_directions(settings.ratio, settings.suppression))


def besides_principal_directions(ratio: float, suppression: float) -> Post:
    """Return SPHERE's post: an update leaves alone the directions that the rows of its weight crowd around.

    arXiv 2510.01172: rows are neurons on a sphere, so each is scaled to length one; the eigenvectors of their second
    moment with the largest eigenvalues are the principal directions ``Q``, and ``ΔW`` becomes
    ``ΔW (I - suppression·Q Qᵀ)``.

    Args:
        ratio: share of the eigenvalues' sum that the principal directions hold at least, 0 to 1.
        suppression: how much of the update along them goes; 1 is all.
    """

    def post(site: EditedSite, update: Update) -> Update:
        rows = site.weight.detach().double().cpu()  # [d_out, d_in]
        rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        # The right singular vectors of rows are the eigenvectors of their second moment.
        directions = torch.linalg.svd(rows, full_matrices=False)
        share = directions.S.square().cumsum(0) / directions.S.square().sum()
        principal = directions.Vh[: int((share < ratio).sum()) + 1]  # [p, d_in]
        u, v = factors_of(update)
        suppressed = v.double() - suppression * (principal.t() @ (principal @ v.double()))
        v = suppressed.float()
        if isinstance(update, LowRank):
            return LowRank(u, v)
        return Dense(u @ v.t())

    return post
