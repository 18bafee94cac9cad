"""RECT: MEMIT, of whose updates only the largest relative changes stay."""

from __future__ import annotations

from typing import ClassVar

from kecore_methods.locate.memit import LeastSquares

__all__ = ["Rect"]


class Rect(LeastSquares):
    """RElative Change in weighT: see :func:`kecore.engine.post.largest_relative_changes`."""

    class Config(LeastSquares.Config):
        """Configuration of RECT."""

        own_stages: ClassVar[tuple[str, ...]] = ("rect",)

    name = "rect"
    reference = (
        "Gu et al., Model Editing Harms General Abilities of Large Language Models: Regularization to the Rescue, "
        "EMNLP 2024, arXiv:2401.04700"
    )
