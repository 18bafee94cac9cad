"""SimIE: ROME, whose edits one after another simulate one ideal edit of all."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from kecore.api.config import StageSettings
from kecore.edit import LowRank, Update, factors_of
from kecore.engine.accumulate import append, gathered
from kecore.engine.closed_form import ClosedForm
from kecore.engine.post import EditedSite, Post
from kecore.ops import kv_solve
from kecore_methods import hparams
from kecore_methods.hparams import HparamsTable
from kecore_methods.locate.rome import Rome

__all__ = ["SimIE", "SimulatedIdeal", "simulated_ideal"]


class SimIE(Rome):
    """Simulating Ideal Editor around ROME: see :func:`simulated_ideal`."""

    class Config(Rome.Config):
        """Configuration of SimIE."""

        preset_file: ClassVar[str] = ""
        hparams_table: ClassVar[HparamsTable | None] = hparams.SIMIE
        own_stages: ClassVar[tuple[str, ...]] = ("simie",)

    name = "simie"
    reference = (
        "Guo et al., Towards Lifelong Model Editing via Simulating Ideal Editor, ICML 2025, openreview:VdEG08ZJCH"
    )


class SimulatedIdeal:
    """Do to the keys of all edits what one edit of them all would have done."""

    class Settings(StageSettings):
        """Settings of the stage."""

        ridge: float = Field(
            default=0.1, gt=0, description="Lambda, relative to the mean squared norm of the first edit's keys."
        )

    name = "simie"
    reference = SimIE.reference
    api = (1, 1)

    def apply(self, form: ClosedForm, settings: SimulatedIdeal.Settings) -> ClosedForm:
        """Return the form with this stage in it."""
        return form.with_post(simulated_ideal(settings.ridge))


def simulated_ideal(ridge: float) -> Post:
    """Return SimIE's post: an update does to the keys of all edits what one edit of them all would have done.

    With ``K_t`` the keys of edit ``t`` and ``Δ_t`` its update, the smallest shift that gives every key what its own
    edit gave it solves a linear system; its recursive form (openreview VdEG08ZJCH) replaces ``Δ_t`` by

        Δ_t K_t K_tᵀ (λI + Σ_{s≤t} K_s K_sᵀ)⁻¹

    Args:
        ridge: λ, relative to the mean squared norm of the first edit's keys.
    """

    def post(site: EditedSite, update: Update) -> Update:
        name = f"simie/{site.id}"
        keys, _ = site.keys.each(compact=True)  # [d_in, c]
        if f"{name}/ridge" not in site.state:
            mean_square = float(keys.double().square().sum()) / len(site.keys.weight)
            site.state[f"{name}/ridge"] = torch.tensor(ridge * mean_square, dtype=torch.float64)
        append(site.state, f"{name}/keys", keys)
        u, v = factors_of(update)
        moved = u.double() @ (v.double().t() @ keys.double())  # [d_out, c], what the update does to its own keys
        all_keys = gathered(site.state, f"{name}/keys")
        solution = kv_solve(all_keys, moved, float(site.state[f"{name}/ridge"]))
        return LowRank(solution.U, solution.V)

    return post
