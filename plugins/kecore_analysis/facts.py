"""Looks at facts before they are edited: what was read, what methods need, and where a subject might be."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kecore import data
from kecore.api.types import Capabilities, EditRecord, EditRequest
from kecore.corpus import Corpus
from kecore.model import ModelView
from kecore.model.sites import ModuleOutput, Patch, Site
from kecore.text import Encoder

__all__ = [
    "count_notes",
    "needs_of",
    "noise_effects",
    "propose_subject",
    "rarity",
    "with_subject",
]

_MOST = 24  # words of a prompt that are tried
_SAMPLES = 5  # of noise
_NOISE = 3.0  # its standard deviation, in units of that of the embeddings, as in ROME
_NAME = 2.0  # weight of a word that is written as a name; the first word of a text only beside another one
_COMMON = 1.0  # rarity below which a word is one of grammar


def count_notes(records: Sequence[EditRecord]) -> dict[str, int]:
    """Return how many records have each field that means nothing to kecore."""
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record.notes.keys())
    return dict(counts)


def needs_of(capabilities: Capabilities, *, subjects: bool, examples: bool = False) -> str:
    """Say in a few words what a method needs before it can edit facts; empty where it needs nothing.

    Args:
        capabilities: of the method.
        subjects: every fact names its subject.
        examples: examples are at hand.
    """
    needs: list[str] = []
    if capabilities.needs_subject and not subjects:
        needs.append("a subject in every fact")
    if capabilities.needs_training:
        needs.append("training (kecore train)")
    if capabilities.needs_examples and not examples:
        needs.append("--examples")
    if capabilities.needs_statistics:
        needs.append("key statistics (collected by itself)")
    return ", ".join(needs)


def propose_subject(view: ModelView, encoder: Encoder, request: EditRequest, spread: float, *, seed: int = 0) -> str:
    """Return the words of a prompt that its answer is most probably about.

    Noise on the embeddings of a word makes the model's own answer unlikely where the answer hangs on that word (causal
    tracing, arXiv 2202.05262, section 2.1). Words that say what is asked matter as well, so the effect of each word is
    weighed by how rare it is in natural text, and doubled where it is written as a name. Words of grammar are left out,
    and so is the last word, which every answer hangs on, of a prompt that breaks off. Names beside the best word belong
    to it.

    Args:
        view: the model.
        encoder: its tokenizer.
        request: a fact without a subject.
        spread: standard deviation of embeddings; see :meth:`Tracer.spread_of`.
        seed: seeds the noise.
    """
    text = request.text
    words = list(re.finditer(r"\w+(?:[.'’-]\w+)*", text))
    if len(words) > 1 and not text[words[-1].end() :].strip():
        words = words[:-1]
    # Words of grammar hold the sentence together, so noise on them tells nothing of what it is about.
    candidates = [word for word in words if rarity(word[0]) > _COMMON] or words
    if not candidates:
        return text
    # The rarest alone, of a text that is long: each takes passes of its own.
    rarest = sorted(candidates, key=lambda word: rarity(word[0]))[-_MOST:]
    candidates = [word for word in candidates if word in rarest]
    spans = [(word.start(), word.end()) for word in candidates]
    effects = noise_effects(view, encoder, text, spans, deviation=_NOISE * spread, seed=seed)
    scores: list[float] = []
    for index, (word, effect) in enumerate(zip(candidates, effects, strict=True)):
        beside = candidates[max(index - 1, 0) : index + 2]
        is_name = word.start() > 0 or any(_belongs(text, other, word) for other in beside if other is not word)
        weight = rarity(word[0]) * (_NAME if is_name and _looks_like_name(word[0]) else 1.0)
        scores.append(effect * weight)
    first = last = max(range(len(candidates)), key=lambda index: scores[index])
    while first > 0 and _belongs(text, candidates[first - 1], candidates[first]):
        first -= 1
    while last + 1 < len(candidates) and _belongs(text, candidates[last + 1], candidates[last]):
        last += 1
    return text[candidates[first].start() : candidates[last].end()]


def _looks_like_name(word: str) -> bool:
    return word[0].isdigit() or word[0].isupper()


def _belongs(text: str, neighbour: re.Match[str], word: re.Match[str]) -> bool:
    """Return whether a word is a name beside a name, with nothing but a space between them."""
    left, right = sorted((neighbour, word), key=lambda match: match.start())
    between = text[left.end() : right.start()]
    return between == " " and neighbour[0][0].isupper() and word[0][0].isupper() and rarity(neighbour[0]) > _COMMON


@torch.no_grad()
def noise_effects(
    view: ModelView,
    encoder: Encoder,
    text: str,
    spans: Sequence[tuple[int, int]],
    *,
    deviation: float,
    samples: int = _SAMPLES,
    seed: int = 0,
) -> list[float]:
    """Return what noise on the embeddings of each span takes from the probability of the model's answer.

    Args:
        view: the model.
        encoder: its tokenizer.
        text: the prompt.
        spans: characters ``[start, end)``.
        deviation: standard deviation of the noise.
        samples: noise samples a span.
        seed: seeds the noise.
    """
    encoded = encoder.encode(text)
    tokens = len(encoded.ids)
    embedding: Any = view.model.get_input_embeddings()  # type: ignore[operator, union-attr]
    noise = deviation * torch.randn((samples, tokens, view.width), generator=torch.Generator().manual_seed(seed))

    def answers(added: Tensor) -> Tensor:
        """Return the probabilities behind the text with ``[rows, tokens, d_model]`` added, the mean ``[vocab]``."""
        rows = encoder.rows([encoded.ids] * len(added)).to(view.device)
        row = torch.arange(len(added), device=view.device)
        patches: dict[Site, Patch] = {ModuleOutput(embedding): lambda embedded: embedded + added.to(embedded)}
        logits = view.run(rows, patches=patches, at=(row, torch.full_like(row, tokens - 1))).logits  # [rows, vocab]
        return logits.float().softmax(-1).mean(0)

    with view.frozen():
        clean = answers(torch.zeros(1, tokens, view.width))
        answer = clean.argmax()
        lost: list[float] = []
        for start, end in spans:
            covers = [begin - encoded.shift < end and stop - encoded.shift > start for begin, stop in encoded.spans]
            mask = torch.tensor(covers).float()  # [tokens]
            lost.append(float(clean[answer] - answers(mask[:, None] * noise)[answer]))
    return lost


@cache
def _counts() -> Counter[str]:
    """Count in how many of the packaged Wikipedia passages each word stands."""
    counts: Counter[str] = Counter()
    for passage in Corpus.of(data.path("wikipedia_sample.jsonl.gz")).passages():
        counts.update(set(re.findall(r"\w+", passage.casefold())))
    return counts


def rarity(word: str) -> float:
    """Return how rare a word is in natural text: the logarithm of one over the share of passages that hold it."""
    counts = _counts()
    total = max(counts.values())
    parts = re.findall(r"\w+", word.casefold())
    return max(math.log((1 + total) / (1 + counts[part])) for part in parts)


def with_subject(record: EditRecord, subject: str) -> EditRecord:
    """Return a record whose request names this subject."""
    return replace(record, request=replace(record.request, subject=subject, prompt=record.request.text))
