"""Generation, batched: the same text for a prompt whatever else is in its batch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kecore.api.errors import ConfigError
from kecore.api.progress import Progress, silent
from kecore.edit import Reader, written
from kecore.inference.decoding import Decoding
from kecore.inference.openings import open_batches
from kecore.inference.scoring import BATCH_TOKENS
from kecore.memory import cached_share

if TYPE_CHECKING:
    from torch import Tensor

    from kecore.model import ModelView
    from kecore.text import Encoder

__all__ = ["Generation", "Watch", "closing_ids", "generate"]

Watch = Callable[[str, str], None]
"""Called after each token as ``watch(prompt, text)`` with all that is written behind the prompt so far."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model wrote after a prompt.

    Args:
        text: without special tokens and outer white space.
        ids: the tokens, the closing one included.
        finished: it ended by itself (end of sequence, or a newline where that ends it) and was not cut.
    """

    text: str
    ids: tuple[int, ...]
    finished: bool


def generate(
    view: ModelView,
    encoder: Encoder,
    prompts: Sequence[str],
    *,
    max_new_tokens: int | Sequence[int] = 32,
    stop_at_newline: bool = False,
    stop: Sequence[str] = (),
    top_k: int = 1,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
    watch: Watch | None = None,
) -> list[Generation]:
    """Continue prompts with the most probable token, again and again; or with one drawn from the most probable ones.

    The loop is kecore's own: ``model.generate`` merges the model's generation settings (a repetition
    penalty, banned tokens) into any it is given, and then the text is no longer the model's argmax. Rows
    are aligned at their last token, masked and numbered explicitly, with a key-value cache where the model
    has one; what many prompts begin with is run once. Rounding of batched matrix products can still tip a
    tie in low precision.

    Args:
        view: the model.
        encoder: decides special tokens and template.
        prompts: equal prompts are continued once.
        max_new_tokens: most tokens to write; one number, or one a prompt. Where fewer fit into the encoder's
            ``max_length``, a text ends there.
        stop_at_newline: a line break after the first visible character ends the text.
        stop: further texts that end it, and do not belong to it, such as a full stop.
        top_k: draw each token from so many of the most probable ones, in proportion to their probabilities.
        seed: of the draws; each prompt has a stream of its own, so that the others do not matter.
        batch_tokens: padded tokens of one micro-batch; a new one counts for what it takes in the cache.
        progress: called after each micro-batch.
        watch: sees the texts grow; what it raises ends the generation.

    Returns:
        One generation a prompt, in order.

    Raises:
        ConfigError: ``max_new_tokens`` or ``top_k`` is below 1.
    """
    new_tokens = _most_new_tokens(prompts, max_new_tokens)
    if min(new_tokens.values(), default=1) < 1 or top_k < 1:
        raise ConfigError(f"max_new_tokens and top_k must be at least 1, got {max_new_tokens} and {top_k}")
    unique = list(dict.fromkeys(prompts))
    ids = [encoder.encode(text).ids for text in written(view.model, unique, Reader(view, encoder))]
    room = math.inf if encoder.max_length is None else encoder.max_length + 1  # the last token is written, not read
    limits = [int(min(new_tokens[prompt], room - len(row))) for prompt, row in zip(unique, ids, strict=True)]
    stops = (*stop, "\n") if stop_at_newline else tuple(stop)
    ending = _Ending(encoder, closing_ids(view, encoder), stops)
    streams: list[random.Random] = []  # one a prompt, where tokens are drawn
    if top_k > 1:
        streams = [random.Random(f"{seed} {prompt}") for prompt in unique]  # noqa: S311 - no secret
    generations: dict[str, Generation] = {}
    with view.frozen(), torch.no_grad():
        # Over a cache a token that was written takes its place there and no more; without one it is read again.
        share = cached_share(view) if view.continues else 1.0
        costs = [math.ceil(share * limit) for limit in limits]
        keep = [1] * len(ids)  # the last token of each row gives the first logits
        for opening, batch, rows in open_batches(view, encoder, ids, keep, costs, batch_tokens, at_ends=True):
            decoding = Decoding(view, rows, opening)
            choose = _Sampler(top_k, [streams[index] for index in batch]) if streams else _most_probable
            show = None if watch is None else _Show(watch, ending, [unique[index] for index in batch])
            texts = _decode(decoding, [limits[index] for index in batch], ending, choose, show)
            for index, text in zip(batch, texts, strict=True):
                generations[unique[index]] = ending.read(text)
            progress("generate", len(generations), len(unique))
    return [generations[prompt] for prompt in prompts]


def _most_new_tokens(prompts: Sequence[str], max_new_tokens: int | Sequence[int]) -> dict[str, int]:
    """Return the most tokens to write after each prompt, by prompt."""
    if isinstance(max_new_tokens, int):
        return dict.fromkeys(prompts, max_new_tokens)
    return dict(zip(prompts, max_new_tokens, strict=False))


def closing_ids(view: ModelView, encoder: Encoder) -> frozenset[int]:
    """Return the tokens that end a text: the tokenizer's, and those of the model's generation settings."""
    settings = getattr(view.model, "generation_config", None)
    of_model: Any = getattr(settings, "eos_token_id", None)  # a token, a list of tokens, or None
    candidates: list[Any] = [encoder.tokenizer.eos_token_id]
    if isinstance(of_model, list):
        candidates += of_model
    else:
        candidates.append(of_model)
    return frozenset(token for token in candidates if isinstance(token, int))


@dataclass(frozen=True, slots=True)
class _Ending:
    """Decides when a text is over, and reads it.

    Args:
        encoder: tokens to text.
        closing: tokens that end a text.
        stops: texts that end it.
    """

    encoder: Encoder
    closing: frozenset[int]
    stops: tuple[str, ...]

    def text(self, ids: Sequence[int]) -> str:
        """Decode tokens as far as they can be read."""
        tokenizer = self.encoder.tokenizer
        text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).lstrip()

    def reached(self, ids: Sequence[int]) -> bool:
        """Return whether the text of these tokens is over."""
        if ids[-1] in self.closing:
            return True
        if not self.stops:  # decoding a text anew for every token is not free
            return False
        return self._end_of(self.text(ids)) is not None

    def read(self, ids: Sequence[int]) -> Generation:
        """Return what was written, without the token or text that ended it."""
        finished = self.reached(ids)
        text = self.text(ids[:-1] if ids[-1] in self.closing else ids)
        return Generation(text[: self._end_of(text)].strip(), tuple(ids), finished)

    def _end_of(self, text: str) -> int | None:
        """Return where the first stop begins; None where there is none."""
        return min((text.index(stop) for stop in self.stops if stop in text), default=None)


def _most_probable(logits: Tensor, _texts: Sequence[int]) -> Tensor:
    """Return the most probable token of each row, ``[rows]``."""
    return logits.argmax(-1)


@dataclass(frozen=True, slots=True)
class _Sampler:
    """Draws one of the ``count`` most probable tokens of each row, from the stream of the text that it writes."""

    count: int
    streams: Sequence[random.Random]

    def __call__(self, logits: Tensor, texts: Sequence[int]) -> Tensor:
        """Return one token a row, ``[rows]``; ``logits`` are ``[rows, vocab]``, ``texts`` the stream of each row."""
        top, ids = logits.double().topk(min(self.count, logits.shape[-1]))  # [rows, count] each
        cumulative = top.softmax(-1).cumsum(-1)  # [rows, count]
        uniform = torch.tensor([[self.streams[i].random()] for i in texts], dtype=cumulative.dtype)  # [rows, 1]
        drawn = (cumulative < uniform.to(cumulative.device)).sum(-1, keepdim=True)  # [rows, 1]
        drawn = drawn.clamp(max=cumulative.shape[-1] - 1)  # the last sum may round to less than 1
        return ids.gather(-1, drawn).squeeze(-1)  # [rows]


@dataclass(frozen=True, slots=True)
class _Show:
    """Shows the texts of a micro-batch while they grow.

    Args:
        watch: sees them.
        ending: tokens to text.
        prompts: the prompt of each text.
    """

    watch: Watch
    ending: _Ending
    prompts: Sequence[str]

    def __call__(self, text: int, ids: Sequence[int]) -> None:
        """Show one text with the tokens that it has now."""
        self.watch(self.prompts[text], self.ending.read(ids).text)


def _decode(
    decoding: Decoding,
    limits: Sequence[int],
    ending: _Ending,
    choose: Callable[[Tensor, Sequence[int]], Tensor],
    show: Callable[[int, Sequence[int]], None] | None = None,
) -> list[list[int]]:
    """Write each text to its end or limit and return its new token ids."""
    ids: list[list[int]] = [[] for _ in limits]
    texts = list(range(len(ids)))  # which text each row of the model's batch writes
    running = set(texts)
    while running:
        token = choose(decoding.logits(), texts)
        for text, value in zip(texts, token.tolist(), strict=True):
            if text not in running:
                continue
            ids[text].append(value)
            if show is not None:
                show(text, ids[text])
            if len(ids[text]) == limits[text] or ending.reached(ids[text]):
                running.discard(text)
        going = [text in running for text in texts]
        decoding.append(token, going)
        rows = [row for row, goes in enumerate(going) if goes]
        if 0 < len(rows) < len(texts) and decoding.keep(rows):
            texts = [texts[row] for row in rows]
    return ids
