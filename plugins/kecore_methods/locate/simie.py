"""SimIE: ROME, whose edits one after another simulate one ideal edit of all."""

from __future__ import annotations

from typing import ClassVar

from kecore_methods.locate.rome import Rome

__all__ = ["SimIE"]


class SimIE(Rome):
    """Simulating Ideal Editor around ROME: see :func:`kecore.engine.post.simulated_ideal`."""

    class Config(Rome.Config):
        """Configuration of SimIE."""

        preset_key: ClassVar[str] = ""
        own_stages: ClassVar[tuple[str, ...]] = ("simie",)

    name = "simie"
    reference = (
        "Guo et al., Towards Lifelong Model Editing via Simulating Ideal Editor, ICML 2025, openreview:VdEG08ZJCH"
    )
