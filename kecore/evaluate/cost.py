"""What an edit costs once it is made: bytes to keep, and time added to each generated token.

Seconds by stage are measured by the session that makes it (:class:`kecore.editor.HistoryEntry`), memory by
:func:`kecore.memory.peak_bytes`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from kecore.api.errors import ConfigError, EditStateError
from kecore.edit import PromptEdit, attached, without_edits
from kecore.inference.generation import generate

if TYPE_CHECKING:
    from kecore.edit import Edit
    from kecore.model import ModelView
    from kecore.text import Encoder

__all__ = ["Latency", "added_latency", "edit_bytes"]


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds to generate one token, one prompt at a time.

    Args:
        base: of the unedited model.
        edited: with the edits that are attached.
    """

    base: float
    edited: float

    @property
    def added(self) -> float:
        """Seconds that the edits add to each token; noise can make it negative."""
        return self.edited - self.base

    def to_json(self) -> dict[str, float]:
        """Return the figures as JSON values."""
        return {"base": self.base, "edited": self.edited, "added": self.added}


def edit_bytes(edit: Edit) -> int:
    """Return the bytes that an edit keeps: its tensors, and of a prompt edit its facts and settings as JSON text."""
    summary = edit.inspect()
    text = ""
    if isinstance(edit, PromptEdit):
        text = json.dumps(summary["settings"], ensure_ascii=False)
    return int(summary["bytes"]) + len(text.encode())


def added_latency(
    view: ModelView, encoder: Encoder, prompts: Sequence[str], *, tokens: int = 32, rounds: int = 3
) -> Latency:
    """Time generation with and without the edits that are attached to a model.

    Reading the prompt is in the time, so what an edit adds there (a longer prompt, a look-up) is spread over the
    tokens. Both models are timed in turns, and the median of the rounds is taken.

    Args:
        view: the model, edited.
        encoder: decides special tokens and template.
        prompts: asked one by one.
        tokens: length of a text; one that ends by itself is timed over the tokens it has.
        rounds: of timing both, after one that is not counted.

    Raises:
        ConfigError: there are no prompts, or no rounds.
        EditStateError: nothing is attached.
    """
    if not prompts or rounds < 1:
        raise ConfigError("latency is timed on at least one prompt, in at least one round")
    if not attached(view.model):
        raise EditStateError("the model carries no edit whose latency could be measured; attach one first")
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(rounds + 1):
        for edited in (False, True):
            seconds = _seconds(view, encoder, prompts, tokens, edited)
            if turn:
                times[edited].append(seconds)
    return Latency(median(times[False]), median(times[True]))


def _seconds(view: ModelView, encoder: Encoder, prompts: Sequence[str], tokens: int, edited: bool) -> float:
    with nullcontext() if edited else without_edits(view.model):
        begin = perf_counter()
        count = sum(len(generate(view, encoder, [prompt], max_new_tokens=tokens)[0].ids) for prompt in prompts)
        if view.device.type == "cuda":
            torch.cuda.synchronize(view.device)
        return (perf_counter() - begin) / count
