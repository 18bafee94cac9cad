"""Generation, batched: the same text for a prompt whatever else is in its batch."""

from __future__ import annotations

import itertools
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

__all__ = ["Generation", "generate"]


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

    Returns:
        One generation a prompt, in order.

    Raises:
        ConfigError: ``max_new_tokens`` or ``top_k`` is below 1.
    """
    limits = itertools.repeat(max_new_tokens) if isinstance(max_new_tokens, int) else max_new_tokens
    most = dict(zip(prompts, limits, strict=False))
    if min(most.values(), default=1) < 1 or top_k < 1:
        raise ConfigError(f"max_new_tokens and top_k must be at least 1, got {max_new_tokens} and {top_k}")
    names = list(dict.fromkeys(prompts))
    ids = [encoder.encode(text).ids for text in written(view.model, names, Reader(view, encoder))]
    full = math.inf if encoder.max_length is None else encoder.max_length + 1  # the last token is written, not read
    limit = [int(min(most[name], full - len(row))) for name, row in zip(names, ids, strict=True)]
    end = _Ending(encoder, _closing_ids(view, encoder), (*stop, *["\n"] * stop_at_newline))
    draws = [random.Random(f"{seed} {name}") for name in names] if top_k > 1 else []  # noqa: S311 - no secret
    found: dict[str, Generation] = {}
    with view.frozen(), torch.no_grad():
        # Over a cache a token that was written takes its place there and no more; without one it is read again.
        share = cached_share(view) if view.continues else 1.0
        costs = [math.ceil(share * count) for count in limit]
        one = [1] * len(ids)
        for opening, batch, rows in open_batches(view, encoder, ids, one, costs, batch_tokens, at_ends=True):
            decoding = Decoding(view, rows, opening)
            choose = _Choice(top_k, [draws[i] for i in batch]) if draws else _most_probable
            new = _decode(decoding, [limit[i] for i in batch], end, choose)
            found.update((names[i], end.read(text)) for i, text in zip(batch, new, strict=True))
            progress("generate", len(found), len(names))
    return [found[prompt] for prompt in prompts]


def _closing_ids(view: ModelView, encoder: Encoder) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's, and those of the model's generation settings."""
    settings = getattr(view.model, "generation_config", None)
    value: Any = getattr(settings, "eos_token_id", None)
    values: list[Any] = [encoder.tokenizer.eos_token_id, *(value if isinstance(value, list) else [value])]
    return frozenset(value for value in values if isinstance(value, int))


@dataclass(frozen=True, slots=True)
class _Ending:
    """When a text is over, and what it then says."""

    encoder: Encoder
    closing: frozenset[int]
    stops: tuple[str, ...]

    def text(self, ids: Sequence[int]) -> str:
        tokenizer = self.encoder.tokenizer
        text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).lstrip()

    def reached(self, ids: Sequence[int]) -> bool:
        # Decoding a text anew for every token is not free: only where something in it can end it.
        return ids[-1] in self.closing or (bool(self.stops) and self._cut(self.text(ids)) is not None)

    def read(self, ids: Sequence[int]) -> Generation:
        finished = self.reached(ids)
        text = self.text(ids[:-1] if ids[-1] in self.closing else ids)
        return Generation(text[: self._cut(text)].strip(), tuple(ids), finished)

    def _cut(self, text: str) -> int | None:
        """Where the first text that ends it begins."""
        return min((text.index(stop) for stop in self.stops if stop in text), default=None)


def _most_probable(logits: Tensor, _texts: Sequence[int]) -> Tensor:
    return logits.argmax(-1)


@dataclass(frozen=True, slots=True)
class _Choice:
    """Draws one of the ``count`` most probable tokens of each row, from the stream of the text that it writes."""

    count: int
    streams: Sequence[random.Random]

    def __call__(self, logits: Tensor, texts: Sequence[int]) -> Tensor:
        top, ids = logits.double().topk(min(self.count, logits.shape[-1]))
        share = top.softmax(-1).cumsum(-1)
        drawn = torch.tensor([[self.streams[i].random()] for i in texts], dtype=share.dtype, device=share.device)
        place = (share < drawn).sum(-1, keepdim=True).clamp(max=share.shape[-1] - 1)
        return ids.gather(-1, place).squeeze(-1)


def _decode(
    decoding: Decoding, limits: Sequence[int], end: _Ending, choose: Callable[[Tensor, Sequence[int]], Tensor]
) -> list[list[int]]:
    """New token ids of each text."""
    ids: list[list[int]] = [[] for _ in limits]
    texts = list(range(len(ids)))  # what the rows of the model's batch write
    running = set(texts)
    while running:
        token = choose(decoding.logits(), texts)
        for i, value in zip(texts, token.tolist(), strict=True):
            if i in running:
                ids[i].append(value)
                if len(ids[i]) == limits[i] or end.reached(ids[i]):
                    running.discard(i)
        going = [i in running for i in texts]
        decoding.append(token, going)
        places = [place for place, goes in enumerate(going) if goes]
        if 0 < len(places) < len(texts) and decoding.keep(places):
            texts = [texts[place] for place in places]
    return ids
