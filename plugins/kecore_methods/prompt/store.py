"""A store of facts, and the decision which of them a prompt is about."""

from __future__ import annotations

import copy
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from kecore.api.config import MethodConfig
from kecore.api.errors import ConfigError
from kecore.api.method import MethodContext
from kecore.api.types import EditRequest
from kecore.edit import PromptEdit, PromptWriter, Reader
from kecore.encoders import CHARACTERS, MINILM, MODEL, load_sentence_encoder
from kecore_methods.prompt.wording import WordingConfig

__all__ = ["EncoderConfig", "ScopeConfig", "ScopeWriter", "StoreWriter", "embedded"]

SW = TypeVar("SW", bound="StoreWriter[Any]")
EC = TypeVar("EC", bound="EncoderConfig")
SC = TypeVar("SC", bound="ScopeConfig")

_THRESHOLDS = {(MINILM, True): 0.3, (MINILM, False): 0.75, (CHARACTERS, True): 0.2, (CHARACTERS, False): 0.6}
"""Where a prompt begins to be about a fact, by encoder and by whether it has to name the subject: see the page."""

_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n")


class EncoderConfig(MethodConfig):
    """How it is found out how alike two texts are."""

    encoder: str = Field(
        default=MINILM,
        description=f"Sentence encoder: {MINILM}, a directory or Hub id, '{MODEL}' (the edited model's own mean hidden "
        f"states) or '{CHARACTERS}' (spelling alone; needs nothing).",
    )

    def check_installed(self) -> None:
        """The encoder, which is loaded once a process; the edited model needs nothing."""
        if self.encoder != MODEL:
            load_sentence_encoder(self.encoder)


class ScopeConfig(WordingConfig, EncoderConfig):
    """Wording, encoder, and when a prompt is about a fact."""

    named: bool = Field(
        default=True, description="A prompt is about a fact only if it names the fact's subject (in any case)."
    )
    threshold: float | None = Field(
        default=None,
        ge=-1,
        le=1,
        description="Cosine of prompt and fact from which on the prompt is about it; None takes the encoder's own.",
    )

    @property
    def least(self) -> float:
        """The threshold.

        Raises:
            ConfigError: none is given, and none is known for this encoder.
        """
        if self.threshold is not None:
            return self.threshold
        known = _THRESHOLDS.get((self.encoder, self.named))
        if known is None:
            raise ConfigError(
                f"no threshold is known for encoder '{self.encoder}'; give one, such as threshold=0.5, tuned on facts "
                "that are not to be edited"
            )
        return known


class StoreWriter(PromptWriter, Generic[EC]):
    """Writes prompts with the help of stored facts.

    Args:
        facts: the store.
        embeddings: ``[facts, width]``, rows of length 1: their prompts as the encoder sees them.
        config: wording, encoder and scope.
    """

    Config: ClassVar[type[EncoderConfig]]

    reader: Reader | None = None
    """The edited model, for writers and encoders that ask it."""

    def __init__(self, facts: Sequence[EditRequest], embeddings: Tensor, config: EC) -> None:
        self.facts, self.embeddings, self.config = tuple(facts), embeddings, config

    @abstractmethod
    def write(self, prompts: Sequence[str]) -> list[str]:
        """What the model reads instead of each prompt."""

    def settings(self) -> dict[str, Any]:
        """The facts and the configuration."""
        return {"facts": [request.to_json() for request in self.facts], "config": self.config.to_json()}

    def tensors(self) -> dict[str, Tensor]:
        """The index."""
        return {"embeddings": self.embeddings}

    @classmethod
    def restore(cls: type[SW], settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SW:
        """The writer with this store."""
        facts = [EditRequest(**request) for request in settings["facts"]]
        config: Any = cls.Config.make(settings["config"])
        return cls(facts, tensors["embeddings"], config)

    def to(self: SW, reader: Reader) -> SW:
        """The same store for this model."""
        made = copy.copy(self)
        made.reader = reader
        return made

    def likeness(self, texts: Sequence[str]) -> Tensor:
        """``[texts, facts]``: cosine of each text, or of its last sentence if that is more alike, with each fact."""
        last = [next((s for s in reversed(_SENTENCE.split(text)) if s.strip()), text) for text in texts]
        embed = load_sentence_encoder(self.config.encoder, self.reader)
        return torch.maximum(embed(texts) @ self.embeddings.T, embed(last) @ self.embeddings.T)


class ScopeWriter(StoreWriter[SC]):
    """A :class:`StoreWriter` that knows which facts a prompt is about."""

    def in_scope(self, prompts: Sequence[str]) -> list[list[int]]:
        """For each prompt the places of the facts that it is about, nearest first."""
        named = [self._named(prompt) for prompt in prompts]
        found: list[list[int]] = [[] for _ in prompts]
        asked = [i for i, places in enumerate(named) if places]
        if asked:
            rows: list[list[float]] = self.likeness([prompts[i] for i in asked]).tolist()
            for i, row in zip(asked, rows, strict=True):
                places = [place for place in named[i] if row[place] >= self.config.least]
                found[i] = sorted(places, key=lambda place, row=row: -row[place])
        return found

    def _named(self, prompt: str) -> list[int]:
        """Facts whose subject the prompt names; all where that is not asked for."""
        if not self.config.named:
            return list(range(len(self.facts)))
        text = prompt.casefold()
        return [i for i, request in enumerate(self.facts) if request.subject.casefold() in text]


def embedded(facts: Sequence[EditRequest], config: EncoderConfig, reader: Reader, context: MethodContext) -> Tensor:
    """``[facts, width]``: the facts' prompts as the encoder sees them; those of earlier edits are not encoded again."""
    known: dict[str, Tensor] = {}
    for edit in context.earlier:
        writer = edit.effect if isinstance(edit, PromptEdit) else None
        if isinstance(writer, StoreWriter) and writer.config.encoder == config.encoder:
            known |= dict(zip((request.text for request in writer.facts), writer.embeddings, strict=True))
    new = [request.text for request in facts if request.text not in known]
    if new:
        known |= dict(zip(new, load_sentence_encoder(config.encoder, reader)(new), strict=True))
    return torch.stack([known[request.text] for request in facts])
