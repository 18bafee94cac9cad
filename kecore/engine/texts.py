"""Texts that an edit is not about: what training may hold still, and what activations are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from kecore.api.types import EditRequest
from kecore.corpus import Corpus
from kecore.data import path

__all__ = ["load_passages", "prompts_about_others"]

_PASSAGES = 64
_SUBJECT_WORDS = 2  # words of a passage that stand in for a subject


@cache
def load_passages() -> tuple[list[str], ...]:
    """Return the words of 64 packaged Wikipedia passages, the same ones for every edit."""
    sample = Corpus.of(path("wikipedia_sample.jsonl.gz")).sample(_PASSAGES, 0)
    return tuple(passage.split() for passage in sample.passages)


def prompts_about_others(request: EditRequest, passages: Sequence[Sequence[str]]) -> list[str]:
    """Return the request's prompt once for each passage, with the passage's first words in the subject's place.

    There are none for a request without a subject.
    """
    if request.subject is None:
        return []
    subjects = [" ".join(words[:_SUBJECT_WORDS]) for words in passages]
    return [request.about(subject) for subject in subjects]
