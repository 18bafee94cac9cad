"""How the studio loads models; apart from what loads them, so that the page is served before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How models are loaded and sessions opened; see :class:`kecore.Editor`.

    Args:
        device: as :func:`kecore.load_model` takes it.
        dtype: as :func:`kecore.load_model` takes it.
        seed: seeds everything random.
        memory: most bytes that the process may hold; None takes three quarters of what is free.
        chat: put prompts into the chat template.
        trust_remote_code: run code that comes with a model.
    """

    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    memory: int | None = None
    chat: bool = False
    trust_remote_code: bool = False
