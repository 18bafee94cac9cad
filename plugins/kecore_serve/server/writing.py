"""One text while it is written: its tokens, its characters so far, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from kecore_serve.server.sampling import Choice, Sampler, Sampling

__all__ = ["FinishReason", "Piece", "TextStream", "TokenInfo", "Writing", "join_pieces"]

FinishReason = Literal["stop", "length"]

_CONTEXT = 6  # tokens of the prompt that the first tokens are decoded with: spaces and bytes may depend on them
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what an incomplete character is decoded to


class TextStream:
    """Turns tokens into text one by one, so that the pieces together are the text of all of them.

    Tokens are decoded together with those before them, since some tokenizers drop or add a space at a text's start,
    and a piece waits until its last character is whole.

    Args:
        tokenizer: a transformers tokenizer.
        prompt_ids: what stands before the text.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT:])
        self._context_start = 0
        self._read = len(self._ids)  # tokens up to here have been given out

    def push(self, token: int) -> str:
        """Add a token, and return the text that is now certain."""
        self._ids.append(token)
        before, text = self._decode(self._ids[self._context_start : self._read]), self._decode_rest()
        if len(text) <= len(before) or text.endswith(_UNFINISHED):
            return ""
        self._context_start, self._read = self._read, len(self._ids)
        return text[len(before) :]

    def finish(self) -> str:
        """Return the text that was held back, whole or not."""
        before = self._decode(self._ids[self._context_start : self._read])
        rest = self._decode_rest()[len(before) :]
        self._context_start = self._read = len(self._ids)
        return rest

    def token_text(self, token: int) -> str:
        """Return what one token is decoded to by itself."""
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def _decode_rest(self) -> str:
        return self._decode(self._ids[self._context_start :])

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """A token that was written, with its log-probability and those of the most probable ones, in nats."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step of a text brought.

    Args:
        text: new characters; empty where none is certain yet.
        tokens: the new tokens, where their probabilities are wanted.
        finish_reason: why the text ends here; None while it goes on.
    """

    text: str
    tokens: tuple[TokenInfo, ...] = ()
    finish_reason: FinishReason | None = None


def join_pieces(pieces: Sequence[Piece]) -> Piece:
    """Make one piece of several that follow each other."""
    text = "".join(piece.text for piece in pieces)
    tokens = tuple(chain.from_iterable(piece.tokens for piece in pieces))
    return Piece(text, tokens, pieces[-1].finish_reason)


class Writing:
    """A text that is being written behind a prompt.

    Args:
        tokenizer: turns tokens into text.
        prompt_ids: the prompt's tokens.
        sampling: how it is written.
        closing: tokens that end a text.
        number: which of the texts of one request it is.
    """

    def __init__(
        self, tokenizer: Any, prompt_ids: Sequence[int], sampling: Sampling, closing: frozenset[int], number: int = 0
    ) -> None:
        self.prompt_ids = tuple(prompt_ids)
        self.sampling = sampling
        self.sampler = Sampler(sampling, number)
        self.written = 0  # tokens
        self.finished = False
        self._closing = closing
        self._stream = TextStream(tokenizer, prompt_ids)
        self._held = ""  # the end of the text that a stop may begin in

    def push(self, choice: Choice) -> Piece:
        """Take the next token, and return what it adds."""
        self.written += 1
        tokens = self._tokens(choice)
        if choice.token in self._closing:
            return self._end("stop", tokens)
        text, is_stopped = self._release(self._stream.push(choice.token))
        if is_stopped:
            self.finished = True
            return Piece(text, tokens, "stop")
        if self.written >= self.sampling.max_tokens:
            last = self._end("length", tokens)
            return Piece(text + last.text, tokens, last.finish_reason)
        return Piece(text, tokens)

    def _end(self, reason: FinishReason, tokens: tuple[TokenInfo, ...]) -> Piece:
        """End the text by a token or its length; a stop may still stand in what was held back."""
        self.finished = True
        text, is_stopped = self._release(self._stream.finish())
        if is_stopped:
            return Piece(text, tokens, "stop")
        return Piece(text + self._held, tokens, reason)

    def _release(self, text: str) -> tuple[str, bool]:
        """Return what can be given out with new text behind what was held back, and whether a stop ends it."""
        if not self.sampling.stop:
            return text, False
        candidate = self._held + text
        places = [candidate.index(stop) for stop in self.sampling.stop if stop in candidate]
        if places:
            self._held = ""
            return candidate[: min(places)], True
        held = max(_overlap(candidate, stop) for stop in self.sampling.stop)
        self._held = candidate[len(candidate) - held :]
        return candidate[: len(candidate) - held], False

    def _tokens(self, choice: Choice) -> tuple[TokenInfo, ...]:
        if choice.logprob is None:
            return ()
        top = tuple((self._stream.token_text(token), logprob) for token, logprob in choice.top)
        return (TokenInfo(self._stream.token_text(choice.token), choice.logprob, top),)


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of ``text`` may be the beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
