"""OTE-SE: MEMIT, whose edits one after another equal one edit of all, also where a stage changes its updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field
from torch import Tensor

from kecore.edit import Dense, Update
from kecore.engine.closed_form import ClosedForm
from kecore.engine.keys import Keys
from kecore.engine.post import EditedSite, Post, untouched
from kecore.model import SiteId
from kecore_methods.locate.memit import LeastSquares

__all__ = ["OteSe", "with_error_feedback"]


class OteSe(LeastSquares):
    """Sequential editing aligned with one-time editing: see :mod:`kecore.engine.accumulate`.

    Where a stage such as RECT or PRUNE changes the updates (``"ote-se + rect"``), what it took from one is given back
    to the next: see :func:`with_error_feedback`.
    """

    class Config(LeastSquares.Config):
        """Configuration of OTE-SE."""

        accumulate: bool = Field(default=True, description="Keep what earlier edits' keys are mapped to; see MEMIT's.")
        error_feedback: bool = Field(
            default=True,
            description="What a stage such as rect or prune takes from an update is given back to the next edit; "
            "without effect where no stage changes updates, or without accumulate.",
        )

        def engine(self, layers: tuple[int, ...], **choices: Any) -> ClosedForm:
            """Return the engine, with the feedback around the stages that change updates."""
            form = super().engine(layers, **choices)
            if not (self.error_feedback and self.accumulate) or form.post is untouched:
                return form
            return replace(form, post=with_error_feedback(form.post))

    name = "ote-se"
    reference = (
        "Wang et al., The Labyrinth and the Thread: Rethinking Regularizations in Sequential Knowledge Editing for "
        "Large Language Models, ICML 2026, arXiv:2605.26670"
    )

    def missing(self, site: SiteId, keys: Keys, residuals: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Return what is missing to weights from which no stage took anything: ``V - (W - E) K = R + E K``."""
        error = state.get(_error_name(site))
        if error is None:
            return residuals
        return residuals + error @ keys.mean()  # [d_out, u]


def with_error_feedback(post: Post) -> Post:
    """Return a stage whose changes of one edit's updates do not add up over a session (arXiv 2605.26670).

    A stage that makes ``P(D)`` of an update ``D`` leaves the error ``E = P(D) - D`` in the weights, and the next edit
    would take it for knowledge. The release keeps ``E M`` with the system's matrix ``M`` and takes it from the right
    side of the next system, ``(R Kᵀ - E M) (M + K Kᵀ)⁻¹``. That is the same as to take the error off the weights, solve
    for what is missing without it, and let the stage act on both together:

        ``-E + (R + E K) Kᵀ (M + K Kᵀ)⁻¹``

    so that no matrix of ``d_in x d_in`` is needed. :meth:`OteSe.missing` adds ``E K``; the rest is done here.

    Args:
        post: the stage.
    """

    def feed_back(site: EditedSite, update: Update) -> Update:
        name = _error_name(site.id)
        whole = update.matrix()  # [d_out, d_in]
        if name in site.state:
            whole = whole - site.state[name]
        changed = post(site, Dense(whole))
        site.state[name] = (changed.matrix() - whole).float()
        return changed

    return feed_back


def _error_name(site: SiteId) -> str:
    return f"ote-se/error/{site}"
