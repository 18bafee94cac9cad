"""SPHERE: AlphaEdit, whose updates leave alone the directions that the weight's rows crowd around."""

from __future__ import annotations

from typing import ClassVar

from kecore_methods.locate.alphaedit import AlphaEdit

__all__ = ["Sphere"]


class Sphere(AlphaEdit):
    """Sparse Projection for Hyperspherical Energy-Regularized Editing.

    See :func:`kecore.engine.post.besides_principal_directions`.
    """

    class Config(AlphaEdit.Config):
        """Configuration of SPHERE."""

        preset_key: ClassVar[str] = ""
        own_stages: ClassVar[tuple[str, ...]] = ("sphere",)

    name = "sphere"
    reference = "Liu et al., Energy-Regularized Sequential Model Editing on Hyperspheres, ICLR 2026, arXiv:2510.01172"
