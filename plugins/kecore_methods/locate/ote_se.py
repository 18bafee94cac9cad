"""OTE-SE: MEMIT, whose edits one after another equal one edit of all."""

from __future__ import annotations

from pydantic import Field

from kecore_methods.locate.memit import LeastSquares

__all__ = ["OteSe"]


class OteSe(LeastSquares):
    """Sequential editing aligned with one-time editing: see :mod:`kecore.engine.accumulate`."""

    class Config(LeastSquares.Config):
        """Configuration of OTE-SE."""

        accumulate: bool = Field(default=True, description="Keep what earlier edits' keys are mapped to; see MEMIT's.")

    name = "ote-se"
    reference = (
        "Wang et al., The Labyrinth and the Thread: Rethinking Regularizations in Sequential Knowledge Editing for "
        "Large Language Models, ICML 2026, arXiv:2605.26670"
    )
