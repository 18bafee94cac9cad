"""The bodies of answers, whole or in chunks, of both endpoints that write texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from kecore_serve.server.worker import Started, Wrote
from kecore_serve.server.writing import Piece, TokenInfo

__all__ = ["Answers", "ChatAnswers", "CompletionAnswers"]


class Answers(ABC):
    """Gathers the texts of a request.

    Args:
        head: ``id``, ``created`` and ``model``.
        texts: how many texts were asked for.
    """

    kind: str
    """``object`` of the whole answer."""

    chunk_kind: str
    """``object`` of a chunk."""

    def __init__(self, head: Mapping[str, Any], texts: int) -> None:
        self._head = dict(head)
        self._pieces: list[list[Piece]] = [[] for _ in range(texts)]
        self._written = [0] * texts
        self._prompt_tokens = 0
        self._characters = [0] * texts  # sent so far, of each text

    def begin(self, started: Started) -> None:
        """Take the state that the answer is made with."""
        self._prompt_tokens = sum(started.prompt_tokens)
        self._head["system_fingerprint"] = started.state
        self._head["kecore"] = {"state": started.state}

    def add(self, wrote: Wrote) -> None:
        """Take what was written."""
        self._pieces[wrote.number].append(wrote.piece)
        self._written[wrote.number] = wrote.written

    def whole(self) -> dict[str, Any]:
        """Return the whole answer."""
        choices = [self._choice(number, pieces) for number, pieces in enumerate(self._pieces)]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self._usage()}

    def opening(self, include_usage: bool) -> list[dict[str, Any]]:
        """Return the chunks before the first text."""
        del include_usage
        return []

    def chunks(self, wrote: Wrote, include_usage: bool) -> list[dict[str, Any]]:
        """Return the chunks of what was written."""
        self._written[wrote.number] = wrote.written
        piece = wrote.piece
        if not (piece.text or piece.tokens or piece.finish_reason):
            return []  # a character that is not whole yet
        choice = self._chunk_choice(wrote.number, piece)
        self._characters[wrote.number] += len(piece.text)
        return [self._chunk([choice], include_usage)]

    def usage_chunk(self) -> dict[str, Any]:
        """Return the chunk that tells the usage."""
        return {**self._head, "object": self.chunk_kind, "choices": [], "usage": self._usage()}

    def _chunk(self, choices: list[dict[str, Any]], include_usage: bool) -> dict[str, Any]:
        usage = {"usage": None} if include_usage else {}
        return {**self._head, "object": self.chunk_kind, "choices": choices, **usage}

    def _usage(self) -> dict[str, int]:
        written = sum(self._written)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self._prompt_tokens + written,
        }

    @abstractmethod
    def _choice(self, number: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return a whole text."""

    @abstractmethod
    def _chunk_choice(self, number: int, piece: Piece) -> dict[str, Any]:
        """Return a part of a text."""


class CompletionAnswers(Answers):
    """Answers of ``/v1/completions``."""

    kind = chunk_kind = "text_completion"

    def _choice(self, number: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        tokens = [token for piece in pieces for token in piece.tokens]
        text = "".join(piece.text for piece in pieces)
        return {
            "index": number,
            "text": text,
            "logprobs": _completion_logprobs(tokens, 0),
            "finish_reason": pieces[-1].finish_reason,
        }

    def _chunk_choice(self, number: int, piece: Piece) -> dict[str, Any]:
        return {
            "index": number,
            "text": piece.text,
            "logprobs": _completion_logprobs(piece.tokens, self._characters[number]),
            "finish_reason": piece.finish_reason,
        }


class ChatAnswers(Answers):
    """Answers of ``/v1/chat/completions``."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self, include_usage: bool) -> list[dict[str, Any]]:
        """Say who speaks, once for each text."""
        delta = {"role": "assistant", "content": ""}
        choices = [
            {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}
            for number in range(len(self._pieces))
        ]
        return [self._chunk([choice], include_usage) for choice in choices]

    def _choice(self, number: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        tokens = [token for piece in pieces for token in piece.tokens]
        text = "".join(piece.text for piece in pieces)
        return {
            "index": number,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": _chat_logprobs(tokens),
            "finish_reason": pieces[-1].finish_reason,
        }

    def _chunk_choice(self, number: int, piece: Piece) -> dict[str, Any]:
        return {
            "index": number,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": _chat_logprobs(piece.tokens),
            "finish_reason": piece.finish_reason,
        }


def _completion_logprobs(tokens: Sequence[TokenInfo], offset: int) -> dict[str, Any] | None:
    if not tokens:
        return None
    offsets: list[int] = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [dict(token.top) for token in tokens],
        "text_offset": offsets,
    }


def _chat_logprobs(tokens: Sequence[TokenInfo]) -> dict[str, Any] | None:
    if not tokens:
        return None
    content = [
        {**_token(token.text, token.logprob), "top_logprobs": [_token(text, logprob) for text, logprob in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}
