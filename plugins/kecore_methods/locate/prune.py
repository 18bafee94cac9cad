"""PRUNE: MEMIT, whose summed updates never stretch a direction much more than the unedited weight does."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from kecore_methods.locate.memit import LeastSquares

__all__ = ["Prune"]


class Prune(LeastSquares):
    """Perturbation Restraint on Upper bouNd for Editing: see :func:`kecore.editing.post.restrained_spectrum`."""

    class Config(LeastSquares.Config):
        """Configuration of PRUNE."""

        preset_key: ClassVar[str] = "memit"

        stages: tuple[str, ...] = Field(default=("prune",), description="Further stages; see MEMIT's.")

    name = "prune"
    reference = "Ma et al., Perturbation-Restrained Sequential Model Editing, ICLR 2025, arXiv:2405.16821"
