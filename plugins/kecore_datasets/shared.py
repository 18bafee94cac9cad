"""Parsing that several data sets have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from kecore.api.types import EditRecord, Probe, ProbeKind
from kecore.evaluate.fields import Fields

__all__ = ["deal_again", "deal_out", "known", "on_axis", "one_hop", "pairs", "question_and_answer"]

Item = TypeVar("Item")


def known(**labels: str | None) -> dict[str, str]:
    """Return the labels that the data set gives."""
    return {name: text for name, text in labels.items() if text}


def on_axis(kind: ProbeKind, axis: str, prompts: Iterable[str], *answers: str) -> list[Probe]:
    """Make probes of prompts that all have the same answers."""
    return [Probe(kind, prompt, answers, axis=axis) for prompt in prompts]


def one_hop(fields: Fields, axis: str = "one_hop") -> list[Probe]:
    """Make the probe of EasyEdit's one-hop portability question, in zsRE and CounterFact-plus alike."""
    if "portability" not in fields:
        return []
    question = fields.object("portability")
    if not question.values:  # as EVOKE writes that there is none
        return []
    return [question.probe("portability", "New Question", "New Answer", axis)]


def question_and_answer(fields: Fields, kind: ProbeKind, axis: str, prompt: str, answer: str) -> list[Probe]:
    """Make a probe of two flat fields, where the data set has them for this record."""
    if not fields.texts(prompt):
        return []
    return [fields.probe(kind, prompt, answer, axis)]


def pairs(fields: Fields, axis: str, prompts: str, answers: str) -> list[Probe]:
    """Make portability probes of two lists of equal length.

    Raises:
        DataFormatError: they are not of equal length.
    """
    questions, texts = fields.texts(prompts), fields.texts(answers)
    if len(questions) != len(texts):
        raise fields.fail(answers, f"a list as long as '{prompts}' ({len(questions)})")
    probes: list[Probe] = []
    for question, text in zip(questions, texts, strict=True):
        probes.append(Probe("portability", question, (text,), axis=axis))
    return probes


def deal_out(items: Sequence[Item], number: int) -> list[list[Item]]:
    """Return the shares of so many records in what a whole set asks, dealt out in turn, so that each is asked once."""
    return [list(items[first::number]) for first in range(number)]


def deal_again(chosen: Sequence[EditRecord], records: Sequence[EditRecord], *kinds: ProbeKind) -> list[EditRecord]:
    """Return the chosen ones of the records, with the probes of these kinds of all records dealt out over them."""
    dealt = list(chosen)
    for kind in kinds:
        probes = [probe for record in records for probe in record.probes_of(kind)]
        shares = deal_out(probes, len(dealt))
        dealt = [record.with_probes(kind, share) for record, share in zip(dealt, shares, strict=True)]
    return dealt
