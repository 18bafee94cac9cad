"""The prompts of a request: texts, tokens and chats, as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kecore.api.errors import RequestError, TokenizerError
from kecore.text import Encoder
from kecore_serve.server.schemas import CompletionRequest, Message
from kecore_serve.server.worker import Prompt

__all__ = ["chat_prompt", "completion_prompts"]


def completion_prompts(body: CompletionRequest, encoder: Encoder) -> list[Prompt]:
    """Return the prompts of a request for completions.

    Raises:
        RequestError: a prompt has no token, or one that the model does not know.
    """
    prompt: Any = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]
    return [_text_prompt(item, encoder) if isinstance(item, str) else _token_prompt(item, encoder) for item in prompt]


def _text_prompt(text: str, encoder: Encoder) -> Prompt:
    def encode(written_text: str) -> Sequence[int]:
        return _need_tokens(encoder.encode(written_text).ids)

    return Prompt(text, encode)


def _token_prompt(ids: Sequence[int], encoder: Encoder) -> Prompt:
    vocabulary = len(encoder.tokenizer)
    unknown = next((token for token in ids if token >= vocabulary), None)
    if unknown is not None:
        raise RequestError(f"token {unknown} is none of the model's, which are 0 to {vocabulary - 1}")
    text = str(encoder.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def encode(written_text: str) -> Sequence[int]:
        # Prompt edits write texts: what they have not touched stays the tokens that were sent.
        return ids if written_text == text else _need_tokens(encoder.encode(written_text).ids)

    return Prompt(text, encode)


def chat_prompt(messages: Sequence[Message], tokenizer: Any) -> Prompt:
    """Return the prompt of a chat: its messages in the tokenizer's template, which opens an answer.

    Raises:
        TokenizerError: the tokenizer has no template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TokenizerError("this model's tokenizer has no chat template; ask /v1/completions instead")
    turns = [{"role": "system" if m.role == "developer" else m.role, "content": m.text()} for m in messages]
    users = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    last = users[-1] if users else len(turns) - 1

    def encode(written_text: str) -> Sequence[int]:
        from jinja2 import TemplateError

        edited_turns = [*turns[:last], {**turns[last], "content": written_text}, *turns[last + 1 :]]
        try:
            text = tokenizer.apply_chat_template(edited_turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise RequestError(f"the model's chat template refuses these messages: {error}") from error
        return _need_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])

    return Prompt(turns[last]["content"], encode)


def _need_tokens(ids: Sequence[int]) -> Sequence[int]:
    if not ids:
        raise RequestError("the prompt has no tokens; send at least one character")
    return ids
