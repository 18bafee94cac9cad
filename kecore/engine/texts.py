"""Texts that an edit is not about."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from kecore.api.types import EditRequest
from kecore.corpus import Corpus
from kecore.data import path

__all__ = ["about_others", "passages"]

_PASSAGES = 64
_NAME = 2  # words of another subject


@cache
def passages() -> tuple[list[str], ...]:
    """Words of packaged Wikipedia passages, the same for every edit."""
    found, _ = Corpus.of(path("wikipedia_sample.jsonl.gz")).sample(_PASSAGES, 0)
    return tuple(passage.split() for passage in found)


def about_others(request: EditRequest, others: Sequence[Sequence[str]]) -> list[str]:
    """The request's prompt, about what the first words of each passage name instead of its subject."""
    return [request.prompt.replace("{}", " ".join(words[:_NAME])) for words in others]
