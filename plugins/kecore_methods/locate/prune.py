"""PRUNE: MEMIT, whose summed updates never stretch a direction much more than the unedited weight does."""

from __future__ import annotations

from typing import ClassVar

from kecore_methods.locate.memit import LeastSquares

__all__ = ["Prune"]


class Prune(LeastSquares):
    """Perturbation Restraint on Upper bouNd for Editing: see :func:`kecore.engine.post.restrained_spectrum`."""

    class Config(LeastSquares.Config):
        """Configuration of PRUNE."""

        own_stages: ClassVar[tuple[str, ...]] = ("prune",)

    name = "prune"
    reference = "Ma et al., Perturbation-Restrained Sequential Model Editing, ICLR 2025, arXiv:2405.16821"
