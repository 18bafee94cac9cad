"""Parsing that several data sets have in common."""

from __future__ import annotations

from collections.abc import Iterable

from kecore.api.types import Probe
from kecore.evaluate.fields import Fields

__all__ = ["one_hop", "pairs", "question_and_answer"]


def one_hop(fields: Fields) -> Iterable[Probe]:
    """EasyEdit's one-hop portability question, in zsRE and CounterFact-plus alike."""
    if "portability" in fields:
        yield fields.object("portability").probe("New Question", "New Answer")


def question_and_answer(fields: Fields, prompt: str, answer: str) -> Iterable[Probe]:
    """A probe of two flat fields, where the data set has them for this record."""
    if fields.texts(prompt):
        yield fields.probe(prompt, answer)


def pairs(fields: Fields, prompts: str, answers: str) -> Iterable[Probe]:
    """Probes of two lists of equal length.

    Raises:
        DataFormatError: they are not of equal length.
    """
    asked, right = fields.texts(prompts), fields.texts(answers)
    if len(asked) != len(right):
        raise fields.fail(answers, f"a list as long as '{prompts}' ({len(asked)})")
    return (Probe(text, (answer,)) for text, answer in zip(asked, right, strict=True))
