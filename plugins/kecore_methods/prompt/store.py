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
from kecore_methods.prompt.encoders import CHARACTERS, MINILM, MODEL, load_sentence_encoder
from kecore_methods.prompt.wording import WordingConfig

__all__ = ["EncoderConfig", "ScopeConfig", "ScopeWriter", "StoreWriter", "embed_facts"]

SW = TypeVar("SW", bound="StoreWriter[Any]")
EC = TypeVar("EC", bound="EncoderConfig")
SC = TypeVar("SC", bound="ScopeConfig")

_THRESHOLDS = {(MINILM, True): 0.3, (MINILM, False): 0.75, (CHARACTERS, True): 0.2, (CHARACTERS, False): 0.6}
"""Where a prompt begins to be about a fact, by encoder and by whether it has to name the subject: see the page."""

_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n")


class EncoderConfig(MethodConfig):
    """The sentence encoder by which texts are compared."""

    encoder: str = Field(
        default=MINILM,
        description=f"Sentence encoder: {MINILM}, a directory or Hub id, '{MODEL}' (the edited model's own mean hidden "
        f"states) or '{CHARACTERS}' (spelling alone; needs nothing).",
    )

    def check_installed(self) -> None:
        """Load the encoder, which is done once a process; the edited model itself needs no package."""
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
        """The threshold in force, the encoder's own unless one is given.

        Raises:
            ConfigError: none is given, and none is known for this encoder.
        """
        if self.threshold is not None:
            return self.threshold
        threshold = _THRESHOLDS.get((self.encoder, self.named))
        if threshold is None:
            raise ConfigError(
                f"no threshold is known for encoder '{self.encoder}'; give one, such as threshold=0.5, tuned on facts "
                "that are not to be edited"
            )
        return threshold


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
        """Return what the model reads instead of each prompt."""

    def settings(self) -> dict[str, Any]:
        """Return the facts and the configuration."""
        return {"facts": [request.to_json() for request in self.facts], "config": self.config.to_json()}

    def tensors(self) -> dict[str, Tensor]:
        """Return the embeddings."""
        return {"embeddings": self.embeddings}

    @classmethod
    def restore(cls: type[SW], settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SW:
        """Return the writer with this store."""
        facts = [EditRequest(**request) for request in settings["facts"]]
        config: Any = cls.Config.make(settings["config"])
        return cls(facts, tensors["embeddings"], config)

    def to(self: SW, reader: Reader) -> SW:
        """Return the same store for this model."""
        writer = copy.copy(self)
        writer.reader = reader
        return writer

    def likeness(self, texts: Sequence[str]) -> Tensor:
        """Return the cosine of each text, or of its last sentence if that is more alike, with each fact.

        Returns:
            ``[texts, facts]``.
        """
        last_sentences = [_last_sentence(text) for text in texts]
        embed = load_sentence_encoder(self.config.encoder, self.reader)
        of_texts = embed(texts) @ self.embeddings.T
        of_last_sentences = embed(last_sentences) @ self.embeddings.T
        return torch.maximum(of_texts, of_last_sentences)


class ScopeWriter(StoreWriter[SC]):
    """A :class:`StoreWriter` that knows which facts a prompt is about."""

    def in_scope(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return for each prompt the indices of the facts that it is about, nearest first."""
        candidates = [self._named_facts(prompt) for prompt in prompts]
        in_scope: list[list[int]] = [[] for _ in prompts]
        # Only prompts that name a subject are encoded, which is what takes long.
        encoded = [i for i, facts in enumerate(candidates) if facts]
        if not encoded:
            return in_scope
        cosines: list[list[float]] = self.likeness([prompts[i] for i in encoded]).tolist()
        for i, cosine in zip(encoded, cosines, strict=True):
            facts = [fact for fact in candidates[i] if cosine[fact] >= self.config.least]
            in_scope[i] = sorted(facts, key=lambda fact, cosine=cosine: -cosine[fact])
        return in_scope

    def _named_facts(self, prompt: str) -> list[int]:
        """Return the indices of facts whose subject the prompt names; all where it need not name any."""
        if not self.config.named:
            return list(range(len(self.facts)))
        text = prompt.casefold()
        named: list[int] = []
        for index, request in enumerate(self.facts):
            # A fact without a subject is about its whole prompt.
            if (request.subject or request.prompt).casefold() in text:
                named.append(index)
        return named


def _last_sentence(text: str) -> str:
    """Return the last sentence that is not blank, or the text itself."""
    for sentence in reversed(_SENTENCE.split(text)):
        if sentence.strip():
            return sentence
    return text


def embed_facts(facts: Sequence[EditRequest], config: EncoderConfig, reader: Reader, context: MethodContext) -> Tensor:
    """Return the embeddings of the facts' prompts, ``[facts, width]``; those of earlier edits are taken from there."""
    embeddings: dict[str, Tensor] = {}
    for edit in context.earlier:
        if not isinstance(edit, PromptEdit) or not isinstance(edit.effect, StoreWriter):
            continue
        writer: StoreWriter[Any] = edit.effect
        if writer.config.encoder == config.encoder:
            texts = [request.text for request in writer.facts]
            embeddings |= dict(zip(texts, writer.embeddings, strict=True))
    new_texts = [request.text for request in facts if request.text not in embeddings]
    if new_texts:
        embed = load_sentence_encoder(config.encoder, reader)
        embeddings |= dict(zip(new_texts, embed(new_texts), strict=True))
    return torch.stack([embeddings[request.text] for request in facts])
