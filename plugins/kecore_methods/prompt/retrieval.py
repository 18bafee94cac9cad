"""The retrieval baseline: the facts that a prompt is about stand before it, and other prompts stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from kecore.api.method import MethodContext
from kecore.api.types import Capabilities
from kecore.batch import RequestBatch
from kecore.edit import PromptEdit, PromptWriter, Reader
from kecore.engine.session_facts import session_facts
from kecore.model import ModelView
from kecore_methods.prompt.store import ScopeConfig, ScopeWriter, embed_facts
from kecore_methods.prompt.wording import check_lengths, preface, prompt_edit

__all__ = ["Retrieval", "RetrievalConfig", "RetrievalWriter"]


class RetrievalConfig(ScopeConfig):
    """Configuration of the retrieval baseline."""

    most: int = Field(default=1, ge=1, description="Most facts before one prompt.")


class RetrievalWriter(ScopeWriter[RetrievalConfig]):
    """Puts the facts that a prompt is about before it, and leaves every other prompt as it is."""

    Config = RetrievalConfig

    def write(self, prompts: Sequence[str]) -> list[str]:
        """Return the facts in scope, nearest last, then the prompt; the prompt alone where none is in scope."""
        texts: list[str] = []
        for prompt, in_scope in zip(prompts, self.in_scope(prompts), strict=True):
            if not in_scope:
                texts.append(prompt)
                continue
            nearest = [self.facts[i] for i in in_scope[: self.config.most]]
            texts.append(preface(self.config, reversed(nearest), prompt))
        return texts


class Retrieval:
    """Keep the facts in a store, and tell the model those that a prompt is about."""

    name = "retrieval"
    Config = RetrievalConfig
    effect: ClassVar[type[PromptWriter]] = RetrievalWriter
    capabilities = Capabilities(kind="prompt", batch=True, sequential=True, needs_subject=False)
    reference = (
        "He et al., Knowledge Updating? No More Model Editing! Just Selective Contextual Reasoning, 2025, "
        "arXiv:2503.05212"
    )
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> PromptEdit:
        """Put the facts into the store."""
        config: RetrievalConfig = context.config
        _ = config.least  # refused here, not at the first prompt
        reader = Reader(view, context.encoder)
        facts = session_facts(batch, context)
        with context.stages("encode"):
            writer = RetrievalWriter(facts, embed_facts(facts, config, reader, context), config)
            check_lengths(writer, batch.requests, reader)
        return prompt_edit(writer, facts, view, context, self.name)
