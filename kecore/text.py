"""Turns text into token rows: the one place that decides spaces, special tokens, templates and padding.

Peers change a score by a forgotten space, a BOS token or the padding side. Here every prompt of every
method and metric goes through :class:`Encoder`, so editing and scoring always agree.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kecore.api.errors import PromptTooLongError, RequestError, TokenizerError

__all__ = ["Encoded", "Encoder", "Rows", "join_context", "separator"]

_MARK = "KECORECONTENT"
_LINE = "\n"


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tokenised prompt with its continuation.

    Args:
        ids: token ids, special tokens included.
        spans: character span ``[start, end)`` of each token in the whole text; empty for special tokens.
        start: index of the first token of the continuation; ``len(ids)`` when there is none.
        shift: characters that the chat template puts before the prompt.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    start: int
    shift: int = 0

    def last_token_of(self, span: tuple[int, int]) -> int:
        """Return the index of the last token that overlaps the characters ``span`` of the prompt.

        Raises:
            TokenizerError: no token overlaps the span.
        """
        start, end = span[0] + self.shift, span[1] + self.shift
        for index in reversed(range(len(self.ids))):
            token_start, token_end = self.spans[index]
            if token_start < end and token_end > start:
                return index
        raise TokenizerError(f"no token covers the characters {span} of the prompt; the tokenizer drops this text")


@dataclass(frozen=True, slots=True)
class Rows:
    """Token rows padded to one rectangle.

    Args:
        input_ids: ``[rows, width]``.
        attention_mask: ``[rows, width]``, 1 for real tokens.
        offset: ``[rows]``, column of each row's first real token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    offset: Tensor

    @property
    def position_ids(self) -> Tensor:
        """Return the position of each token in its row, ``[rows, width]``; on padding the one before, or 0."""
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)

    @property
    def ends(self) -> Tensor:
        """Return the column behind each row's last real token, ``[rows]``."""
        return self.offset + self.attention_mask.sum(-1)

    def to(self, device: torch.device | str) -> Rows:
        """Return the same rows on another device."""
        return Rows(self.input_ids.to(device), self.attention_mask.to(device), self.offset.to(device))

    def select(self, index: Tensor) -> Rows:
        """Return some of the rows, at the same width."""
        return Rows(self.input_ids[index], self.attention_mask[index], self.offset[index])


def separator(prompt: str, target: str) -> str:
    """Return what stands between a prompt and its continuation: one space, or nothing.

    Nothing where white space or an opening bracket or quote ends the prompt, where the continuation opens
    with closing punctuation, and between characters of scripts that write no spaces.
    """
    if not prompt or not target or prompt[-1].isspace() or target[0].isspace():
        return ""
    if prompt[-1] in '([{"“‘«（「『' or target[0] in ".,;:!?)]}%’”»，。；：！？）」』":
        return ""
    if _is_wide(prompt[-1]) or _is_wide(target[0]):
        return ""
    return " "


def join_context(context: str, prompt: str) -> str:
    """Put a prompt behind a context; the empty context leaves it as it is."""
    return f"{context}. {prompt}" if context else prompt


def _is_wide(character: str) -> bool:
    """Return whether a character is of a script that writes no spaces."""
    return unicodedata.east_asian_width(character) in ("W", "F")


class Encoder:
    """Turns prompts into token rows for one tokenizer and one prompt form.

    Args:
        tokenizer: a fast transformers tokenizer (offsets are needed to find the subject).
        chat: put prompts as the user's message into the tokenizer's chat template; continuations then
            open the assistant's answer.
        max_length: longest row accepted, in tokens; None for no limit.
        handover: of an encoder-decoder the tokens between what its encoder reads, the prompt, and what its decoder
            writes (:attr:`kecore.model.ModelView.handover`). They close every prompt, and a continuation is then
            tokenised as a text of its own.

    Raises:
        TokenizerError: the tokenizer gives no offsets, or ``chat`` is asked for without a template.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat: bool = False,
        max_length: int | None = None,
        handover: Sequence[int] = (),
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise TokenizerError(
                f"{type(tokenizer).__name__} gives no character offsets, which kecore needs to find the "
                "subject's tokens; load the fast version (AutoTokenizer.from_pretrained(..., use_fast=True))"
            )
        self.tokenizer = tokenizer
        self.chat = chat
        self.max_length = max_length
        self.handover = tuple(handover)
        self._prefix, self._suffix = self._template() if chat else ("", "")

    def _template(self) -> tuple[str, str]:
        """Return what the chat template writes before and after a user's message."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise TokenizerError(
                f"{type(self.tokenizer).__name__} has no chat template; edit and evaluate without chat"
            )
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
        )
        prefix, mark, suffix = text.partition(_MARK)
        if not mark:
            raise TokenizerError("the chat template drops the user's message; edit without chat")
        return prefix, suffix

    @property
    def pad_id(self) -> int:
        """Return the token id of padding, which is always masked."""
        for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
            value = getattr(self.tokenizer, name, None)
            if isinstance(value, int):
                return value
        return 0

    def text(self, prompt: str, target: str = "") -> str:
        """Return the whole text that the model reads for a prompt and its continuation."""
        if self.chat:
            return f"{self._prefix}{prompt}{self._suffix}{target}"
        return f"{prompt}{separator(prompt, target)}{target}"

    def encode(self, prompt: str, target: str = "") -> Encoded:
        """Tokenise a prompt and its continuation.

        The continuation's tokens are those that reach past the prompt's last character. Where one token
        would hold the end of the prompt and the start of the continuation, both are tokenised apart, so
        that the prompt's tokens never depend on the continuation.

        Raises:
            RequestError: the continuation has no tokens.
            PromptTooLongError: more than ``max_length`` tokens.
        """
        boundary = len(self.text(prompt))
        if self.handover:
            ids, spans, start = self._apart(prompt, target)
        else:
            ids, spans = self._tokens(self.text(prompt, target), special=not self.chat)
            start = len(ids)
        if target and not self.handover:
            start = next((i for i, (_, end) in enumerate(spans) if end > boundary), len(ids))
            if start < len(ids) and spans[start][0] < boundary:
                ids, spans = self._tokens(self.text(prompt), special=not self.chat)
                start = len(ids)
                tail, tail_spans = self._tail(self.text(prompt, target)[boundary:])
                ids += tail
                spans += [(start + boundary, end + boundary) for start, end in tail_spans]
        if target and start == len(ids):
            raise RequestError(f"the tokenizer gives no tokens for the target {target!r}")
        if self.max_length is not None and len(ids) > self.max_length:
            raise PromptTooLongError(
                f"prompt and target take {len(ids)} tokens, the model's context holds {self.max_length}; "
                f"shorten the prompt that begins {prompt[:60]!r}"
            )
        return Encoded(tuple(ids), tuple(spans), start, len(self._prefix))

    def _apart(self, prompt: str, target: str) -> tuple[list[int], list[tuple[int, int]], int]:
        """Tokenise a prompt for the encoder and a continuation for the decoder, with the handover between them.

        Returns:
            Token ids, their character spans in the whole text, and the index of the continuation's first token.
        """
        text = self.text(prompt)
        ids, spans = self._tokens(text, special=not self.chat, closed=True)
        closing, *opening = self.handover
        added = opening if ids and ids[-1] == closing else [closing, *opening]
        ids += added
        spans += [(len(text), len(text))] * len(added)
        start = len(ids)
        if target:
            tail, tail_spans = self._tokens(target.lstrip(), special=False)
            before = len(self.text(prompt, target)) - len(target.lstrip())
            ids += tail
            spans += [(first + before, end + before) for first, end in tail_spans]
        return ids, spans, start

    def _tail(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenise a text as it stands inside another one: at a text's start, some tokenizers would add a space."""
        ids, spans = self._tokens(_LINE + text, special=False)
        begin = next((i for i, (_, end) in enumerate(spans) if end > len(_LINE)), len(ids))
        if begin < len(ids) and spans[begin][0] < len(_LINE):
            return self._tokens(text, special=False)  # the line break was merged with the text
        shifted = [(start - len(_LINE), end - len(_LINE)) for start, end in spans[begin:]]
        return ids[begin:], shifted

    def _tokens(self, text: str, *, special: bool, closed: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Return token ids and their character spans; with the tokens that close a text where that is ``closed``."""
        out = self.tokenizer(
            text,
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        ids: list[int] = list(out["input_ids"])
        spans: list[tuple[int, int]] = [(int(start), int(end)) for start, end in out["offset_mapping"]]
        is_special: list[int] = list(out["special_tokens_mask"])
        while special and not closed and ids and is_special[-1] and spans[-1][0] == spans[-1][1]:
            # A closing token (EOS, SEP) would end the text before the model continues it.
            del ids[-1], spans[-1], is_special[-1]
        return ids, spans

    def rows(self, ids: Sequence[Sequence[int]], columns: Sequence[int] | None = None) -> Rows:
        """Pad token rows to one rectangle; docs/concepts.md draws it.

        Args:
            ids: one id sequence a row.
            columns: for each row the index of the token that all rows hold in one common column (padding
                then goes on both sides); by default rows are aligned at their first token.
        """
        columns = [0] * len(ids) if columns is None else list(columns)
        anchor = max(columns, default=0)  # the common column
        offsets = [anchor - column for column in columns]
        width = max((offset + len(row) for offset, row in zip(offsets, ids, strict=True)), default=0)
        tokens = torch.full((len(ids), width), self.pad_id, dtype=torch.long)  # [rows, width]
        mask = torch.zeros_like(tokens)
        for i, (row, offset) in enumerate(zip(ids, offsets, strict=True)):
            tokens[i, offset : offset + len(row)] = torch.tensor(list(row))
            mask[i, offset : offset + len(row)] = 1
        return Rows(tokens, mask, torch.tensor(offsets, dtype=torch.long))
