"""A model that is open in the studio, with its edits and what asks it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kecore.api.progress import Progress
from kecore.editor import Editor
from kecore.models import load_model
from kecore_studio.asking import Asker
from kecore_studio.settings import Settings
from kecore_studio.stack import Timeline

__all__ = ["OpenModel"]


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A model with its edits.

    Args:
        ref: the reference that it was loaded by.
        editor: the session.
        asker: asks it.
        timeline: its edits, and the way back.
    """

    ref: str
    editor: Editor
    asker: Asker
    timeline: Timeline

    @classmethod
    def of(cls, editor: Editor, ref: str) -> OpenModel:
        """Return the model of a session without edits."""
        return cls(ref, editor, Asker(editor), Timeline())

    @classmethod
    def load(cls, ref: str, settings: Settings, progress: Progress) -> OpenModel:
        """Load a model and open a session on it.

        Args:
            ref: as :func:`kecore.load_model` takes it.
            settings: how.
            progress: called as the loading goes on.

        Raises:
            ModelLoadError: the reference leads nowhere.
            UnsupportedModelError: the model's structure cannot be read.
        """
        torch.manual_seed(settings.seed)
        progress(f"loading {ref}", 0, 0)
        loaded = load_model(
            ref, device=settings.device, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code
        )
        progress("reading the model's structure and fingerprint", 0, 0)
        editor = Editor(
            loaded.model,
            loaded.tokenizer,
            chat=settings.chat,
            seed=settings.seed,
            memory=settings.memory,
            progress=progress,
        )
        return cls.of(editor, ref)
