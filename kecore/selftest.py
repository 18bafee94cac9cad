"""Tries a model out: one edit with a cheap method of each family, checked, and taken off again."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kecore.api import registry
from kecore.api.errors import KecoreError, KecoreWarning
from kecore.api.identity import Identity
from kecore.api.line import MethodLine
from kecore.api.progress import Progress, silent
from kecore.api.types import EditRequest
from kecore.catalogue import MethodCard, methods
from kecore.edit import Reader, written
from kecore.editor import Editor
from kecore.inference.scoring import next_tokens, score_continuations

__all__ = ["FACT", "Trial", "cheapest_methods", "try_out"]

FACT = EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English")
"""What is edited: any model can be asked it, and none has to know the answer."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of one edit.

    Args:
        family: the family of the method, such as ``memory``.
        method: its name.
        outcome: ``works``, ``fails`` or ``not tried``.
        reason: why it does not work or was not tried; empty where it works.
        before: mean log-probability of the target's tokens before the edit; None where nothing was edited.
        after: the same with the edit on the model.
        seconds: what edit, check and revert took.
    """

    family: str
    method: str
    outcome: str
    reason: str = ""
    before: float | None = None
    after: float | None = None
    seconds: float = 0.0


def cheapest_methods() -> dict[str, MethodCard]:
    """Return the cheapest method of each family that can be used as it is, by the catalogue's measured seconds.

    Of a family in which every method needs training, statistics or examples, the cheapest of those.
    """
    cheapest: dict[str, MethodCard] = {}
    for family, cards in methods().families().items():
        cheapest[family] = min(cards, key=_effort)
    return cheapest


def _effort(card: MethodCard) -> tuple[bool, float]:
    """Order methods: those that need nothing first, then by seconds a fact; unmeasured ones last."""
    seconds = math.inf
    if card.measured is not None and card.measured.seconds_per_fact is not None:
        seconds = card.measured.seconds_per_fact
    return bool(_missing(card)), seconds


def _missing(card: MethodCard) -> str:
    """Return what a method needs that a model alone does not bring, in words; empty if nothing."""
    capabilities = registry.default_registry().get(card.name).capabilities
    if capabilities.needs_training:
        return f"needs training: kecore train {card.name} MODEL"
    if capabilities.needs_statistics:
        return "needs key statistics: kecore stats MODEL"
    if capabilities.needs_examples:
        return "needs examples: --examples FILE"
    return ""


def try_out(
    model: Any, tokenizer: Any, *, cards: Sequence[MethodCard] | None = None, seed: int = 0, progress: Progress = silent
) -> list[Trial]:
    """Edit a model with a cheap method of each family, one at a time, and take every edit off again.

    An edit of weights or modules works where the target becomes likelier; one of prompts where the model reads the
    target. All of them have to leave the model's weights, and its answer to the fact's prompt, as they were to the bit.

    Args:
        model: a transformers language model without edits.
        tokenizer: its fast tokenizer.
        cards: the methods; by default :func:`cheapest_methods`.
        seed: seeds everything random.
        progress: called after each method.

    Raises:
        UnsupportedModelError: the model's structure cannot be read.
        TokenizerError: the tokenizer gives no offsets.
    """
    cards = list(cheapest_methods().values()) if cards is None else cards
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)
        editor = Editor(model, tokenizer, statistics=None, seed=seed, progress=None)
        trials: list[Trial] = []
        for card in cards:
            trials.append(_try_method(editor, card))
            progress("try methods", len(trials), len(cards))
    return trials


def _try_method(editor: Editor, card: MethodCard) -> Trial:
    """Make, check and revert one edit; whatever goes wrong becomes the trial's reason."""
    if missing := _missing(card):
        return Trial(card.family, card.name, "not tried", missing)
    started = time.perf_counter()
    before: float | None = None
    after: float | None = None
    try:
        weights, answer, before = _state(editor)
        try:
            editor.edit(FACT, MethodLine.of(card.name))
            after = _likelihood(editor)
            reason = _reason_against(editor, card, before, after)
        finally:
            if editor.history:
                editor.revert()
        restored_weights, restored_answer, _ = _state(editor)
        if restored_weights != weights or not torch.equal(restored_answer, answer):
            reason = "the model is not what it was after the edit was taken off"
    except KecoreError as error:
        reason = str(error)
    except Exception as error:  # noqa: BLE001 - whatever a method raises on a new kind of model is what is asked here
        reason = f"{type(error).__name__}: {error}"
    return Trial(
        card.family,
        card.name,
        "fails" if reason else "works",
        reason,
        before=before,
        after=after,
        seconds=round(time.perf_counter() - started, 2),
    )


def _state(editor: Editor) -> tuple[str, torch.Tensor, float]:
    """Return a digest of the weights, the distribution after the fact's prompt, and the target's likelihood."""
    digest = Identity(editor.model).of(editor.view.dtype)
    (answer,) = next_tokens(editor.view, editor.encoder, [FACT.text])  # [vocab]
    return digest, answer, _likelihood(editor)


def _likelihood(editor: Editor) -> float:
    """Return the mean log-probability of the target's tokens."""
    (score,) = score_continuations(editor.view, editor.encoder, [(FACT.text, FACT.target)])
    return score.mean


def _reason_against(editor: Editor, card: MethodCard, before: float, after: float) -> str:
    """Return why an edit that is on the model has not worked; empty where it has."""
    if card.changes == "prompt":
        (text,) = written(editor.model, [FACT.text], Reader(editor.view, editor.encoder))
        return "" if FACT.target in text else "the model does not read the fact"
    if after > before:
        return ""
    return f"the target is no likelier: {before:.2f} before, {after:.2f} after (mean log-probability of a token)"
