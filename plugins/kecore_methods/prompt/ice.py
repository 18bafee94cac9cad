"""ICE: every fact stands before every prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from kecore.api.method import MethodContext
from kecore.api.types import Capabilities, EditRequest
from kecore.batch import RequestBatch
from kecore.edit import PromptEdit, PromptWriter
from kecore.engine.session_facts import session_facts
from kecore.memory import Need
from kecore.model import ModelView
from kecore_methods.presets import Published
from kecore_methods.prompt.wording import WordingConfig, check_room, preface, prompt_edit

__all__ = ["Ice", "IceConfig", "IceWriter"]


class IceConfig(Published, WordingConfig):
    """Configuration of ICE: its wording."""

    preset_file: ClassVar[str] = "ice"

    def needs(self, view: ModelView, batch: RequestBatch) -> Sequence[Need]:
        """Return nothing: no memory is taken. What is needed is room in the context, before anything is asked.

        Raises:
            PromptTooLongError: the facts leave no room for a prompt.
        """
        check_room(self, batch.requests, batch.encoder)
        return super().needs(view, batch)


class IceWriter(PromptWriter):
    """Puts facts before a prompt.

    Args:
        facts: all of them.
        wording: how they are written.
    """

    def __init__(self, facts: Sequence[EditRequest], wording: WordingConfig) -> None:
        self.facts, self.wording = tuple(facts), wording

    def settings(self) -> dict[str, Any]:
        """Return the facts and their wording."""
        return {"facts": [request.to_json() for request in self.facts], "wording": self.wording.to_json()}

    def tensors(self) -> dict[str, Tensor]:
        """Return no tensors: the facts are text."""
        return {}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> IceWriter:
        """Return the writer with these facts."""
        del tensors
        return cls([EditRequest(**request) for request in settings["facts"]], IceConfig.make(settings["wording"]))

    def write(self, prompts: Sequence[str]) -> list[str]:
        """Return every fact, then the prompt; no prompt is out of scope."""
        return [preface(self.wording, self.facts, prompt) for prompt in prompts]


class Ice:
    """Tell the model the facts with each prompt."""

    name = "ice"
    Config = IceConfig
    effect: ClassVar[type[PromptWriter]] = IceWriter
    capabilities = Capabilities(kind="prompt", batch=True, sequential=True, needs_subject=False)
    reference = (
        "Cohen et al., Evaluating the Ripple Effects of Knowledge Editing in Language Models, TACL 2024, "
        "arXiv:2307.12976; Zhang et al., A Comprehensive Study of Knowledge Editing for LLMs, 2024, arXiv:2401.01286"
    )
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> PromptEdit:
        """Remember the facts."""
        facts = session_facts(batch, context)
        check_room(context.config, facts, context.encoder)
        writer = IceWriter(facts, context.config)
        return prompt_edit(writer, facts, view, context, self.name)
