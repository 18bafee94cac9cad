"""Wordings of facts and prompts, and the edits that write them before a prompt."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import AfterValidator, Field

from kecore.api.config import MethodConfig
from kecore.api.errors import PromptTooLongError
from kecore.api.method import MethodContext
from kecore.api.types import EditRequest
from kecore.edit import PromptEdit, PromptWriter, Reader
from kecore.model import ModelView
from kecore.text import Encoder, separator

__all__ = ["FACT", "PROMPT", "WordingConfig", "check_lengths", "check_room", "preface", "prompt_edit", "statement"]

FACT, PROMPT = "{fact}", "{prompt}"

_CONTINUATION = 64  # tokens that are left for what the model writes behind a prompt


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


def check_room(wording: WordingConfig, facts: Sequence[EditRequest], encoder: Encoder) -> None:
    """Refuse more facts than a model's context holds before one of their prompts, its answer and a short continuation.

    Raises:
        PromptTooLongError: says how many of the facts fit.
    """
    if encoder.max_length is None:
        return
    plain = Encoder(encoder.tokenizer, chat=encoder.chat)  # which counts any length
    longest = max(facts, key=lambda request: len(request.text) + len(request.target))

    def length(count: int) -> int:
        return len(plain.encode(preface(wording, facts[:count], longest.text), longest.target).ids)

    room = encoder.max_length - _CONTINUATION
    if length(len(facts)) <= room:
        return
    fitting = bisect_right(range(1, len(facts)), room, key=length)
    raise PromptTooLongError(
        f"{len(facts)} facts before each prompt take {length(len(facts))} tokens, the model's context holds "
        f"{encoder.max_length}, and an answer needs {_CONTINUATION} of them: {fitting} of the facts fit. Edit so many, "
        "or take a method that puts only the facts before a prompt that it is about, such as 'retrieval'"
    )


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
