"""NAS: AlphaEdit, whose values are as long as the unedited model's."""

from __future__ import annotations

from typing import ClassVar

from kecore_methods.locate.alphaedit import AlphaEdit

__all__ = ["Nas"]


class Nas(AlphaEdit):
    """Norm-Anchor Scaling on AlphaEdit's solve, as released: see :func:`kecore.engine.target.norm_anchored`."""

    class Config(AlphaEdit.Config):
        """Configuration of NAS."""

        preset_key: ClassVar[str] = "nas"
        own_stages: ClassVar[tuple[str, ...]] = ("nas",)

    name = "nas"
    reference = "Liu et al., Norm Anchors Make Model Edits Last, 2026, arXiv:2602.02543"
