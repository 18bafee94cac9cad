"""Sentence encoders turn texts into unit vectors whose products say how alike the texts are.

Methods that retrieve (demonstrations, facts that a prompt is about) choose one by name:

* ``all-MiniLM-L6-v2``, the encoder of the literature, which the extra ``kecore[prompt]`` brings; or any directory or
  Hub id of a sentence encoder that pools by the mean.
* ``model``: mean hidden states of the edited model itself. Nothing to install, and a poor judge of likeness.
* ``character-ngrams``: shares of character n-grams. No model at all: it sees spelling, not meaning.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kecore.api.errors import EditStateError
from kecore.model.sites import Output
from kecore.models import MINILM, load_encoder

if TYPE_CHECKING:
    from kecore.edit import Reader

__all__ = ["CHARACTERS", "MINILM", "MODEL", "Embed", "load_sentence_encoder"]

MODEL = "model"
CHARACTERS = "character-ngrams"

Embed = Callable[[Sequence[str]], Tensor]
"""Texts to ``[texts, width]`` float32 on the CPU, rows of length 1."""

_BATCH = 32  # texts that are encoded together
_LONGEST = 256  # tokens of a text, as all-MiniLM-L6-v2 has it; what is longer is cut
_ORDERS = (3, 4)
_BUCKETS = 4096


def load_sentence_encoder(name: str, reader: Reader | None = None) -> Embed:
    """Load the encoder of a name.

    Args:
        name: :data:`MINILM`, :data:`MODEL`, :data:`CHARACTERS`, a directory or a Hub id.
        reader: the edited model, for :data:`MODEL`.

    Raises:
        MissingDependencyError: :data:`MINILM` is neither installed nor at hand.
        ModelLoadError: the directory or Hub id holds no encoder.
        EditStateError: :data:`MODEL` without a model.
    """
    if name == CHARACTERS:
        return _character_ngrams
    if name == MODEL:
        if reader is None:
            raise EditStateError(
                f"encoder '{MODEL}' asks the edited model itself: pass `written(model, prompts, Reader(view, encoder))`"
            )
        return lambda texts: _hidden_states(reader, texts)
    return _load_pooled(name)


@cache
def _load_pooled(name: str) -> Embed:
    """Load an encoder, once a process, that returns the mean of a text's last hidden states."""
    model, tokenizer = load_encoder(name)

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        rows: list[Tensor] = []
        for start in range(0, len(texts), _BATCH):
            batch = tokenizer(
                list(texts[start : start + _BATCH]),
                padding=True,
                truncation=True,
                max_length=_LONGEST,
                return_tensors="pt",
            )
            mask = batch["attention_mask"].unsqueeze(-1)  # [texts, tokens, 1]
            states = model(**batch).last_hidden_state  # [texts, tokens, width]
            rows.append((states * mask).sum(1) / mask.sum(1))  # [texts, width]
        return normalize(torch.cat(rows), dim=-1) if rows else torch.empty(0)

    return embed


@torch.no_grad()
def _hidden_states(reader: Reader, texts: Sequence[str]) -> Tensor:
    """Average the middle layer's output over a text's tokens, without the first: it gathers attention, not meaning."""
    from kecore.text import Encoder

    view, layer = reader.view, len(reader.view.layers) // 2
    encoder = Encoder(reader.encoder.tokenizer, max_length=reader.encoder.max_length)
    rows: list[Tensor] = []
    with view.frozen():
        for text in texts:
            ids = encoder.encode(text).ids
            site = Output(layer)
            states = view.run(encoder.rows([ids]), taps=[site], last=layer)[site][0]  # [tokens, width]
            rows.append(states[min(1, len(ids) - 1) :].float().mean(0).cpu())
    return normalize(torch.stack(rows), dim=-1)


def _character_ngrams(texts: Sequence[str]) -> Tensor:
    """Return logarithmic counts of the character n-grams inside words, hashed into buckets."""
    counts = torch.zeros(len(texts), _BUCKETS)
    for row, text in zip(counts, texts, strict=True):
        grams: Counter[str] = Counter()
        for n in _ORDERS:
            for word in text.lower().split():
                padded = f" {word} "
                grams.update(padded[i : i + n] for i in range(len(padded) - n + 1))
        for gram, count in grams.items():
            row[zlib.crc32(gram.encode()) % _BUCKETS] += 1 + math.log(count)
    return normalize(counts, dim=-1)
