"""Wordings of facts and prompts, and the edits that write them before a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import AfterValidator, Field

from kecore.api.config import MethodConfig
from kecore.api.method import MethodContext
from kecore.api.types import EditRequest
from kecore.edit import PromptEdit, PromptWriter, Reader
from kecore.model import ModelView
from kecore.text import separator

__all__ = ["FACT", "PROMPT", "WordingConfig", "check_lengths", "preface", "prompt_edit", "statement"]

FACT, PROMPT = "{fact}", "{prompt}"


def _with_fact(template: str) -> str:
    if template.count(FACT) != 1:
        raise ValueError(f"must hold {FACT} once")
    return template


def _with_prompt(template: str) -> str:
    if not template.endswith(PROMPT) or template.count(PROMPT) != 1:
        raise ValueError(f"must end with {PROMPT}, and hold it once: the answer follows the prompt")
    return template


class WordingConfig(MethodConfig):
    """The wording of a fact and a prompt; the default is the template of IKE (arXiv 2305.12740)."""

    fact: Annotated[str, AfterValidator(_with_fact)] = Field(
        default="New Fact: {fact}\n", description="How one fact is written, with {fact} where its statement stands."
    )
    prompt: Annotated[str, AfterValidator(_with_prompt)] = Field(
        default="Prompt: {prompt}", description="How the prompt is written behind the facts; ends with {prompt}."
    )


def statement(prompt: str, target: str) -> str:
    """Return a fact as a statement: the prompt and what follows it."""
    return f"{prompt}{separator(prompt, target)}{target}"


def preface(wording: WordingConfig, facts: Iterable[EditRequest], prompt: str) -> str:
    """Return the facts, one after another, and the prompt behind them."""
    statements = [statement(request.text, request.target) for request in facts]
    preceding = "".join(wording.fact.replace(FACT, text) for text in statements)
    return preceding + wording.prompt.replace(PROMPT, prompt)


def check_lengths(writer: PromptWriter, requests: Sequence[EditRequest], reader: Reader) -> None:
    """Refuse facts whose own prompts leave no room for what stands before them.

    Raises:
        PromptTooLongError: says which.
    """
    texts = writer.to(reader).write([request.text for request in requests])
    for request, text in zip(requests, texts, strict=True):
        reader.encoder.encode(text, request.target)


def prompt_edit(
    writer: PromptWriter, facts: Sequence[EditRequest], view: ModelView, context: MethodContext, method: str
) -> PromptEdit:
    """Return the edit of a writer that holds all of ``facts``, those of earlier edits among them."""
    return PromptEdit(
        effect=writer,
        supersedes=True,
        base=context.fingerprint(view),
        method=method,
        config=context.config.to_json(),
        requests=tuple(facts),
        seed=context.seed,
    )
