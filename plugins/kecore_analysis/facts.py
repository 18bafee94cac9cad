"""Looks at facts before they are edited: what was read, what is doubtful, and where a subject might be."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kecore.api.types import Capabilities, EditRecord, EditRequest, unique
from kecore.model import ModelView
from kecore.text import Encoder
from kecore_analysis.trace import Known
from kecore_analysis.tracer import Tracer

__all__ = ["Doubt", "count_notes", "find_doubts", "needs_of", "propose_subject", "with_subject"]

_GROWTH = 1.15  # how much more a longer span must take away from the answer to be the subject
_SAMPLES = 5  # of noise


@dataclass(frozen=True, slots=True)
class Doubt:
    """Something about facts that their author should know.

    Args:
        kind: what it is, in a few words that are the same for all facts of the kind.
        ids: the requests that it is about.
        example: the first of them in words.
        stops: the facts cannot be edited so.
    """

    kind: str
    ids: tuple[str, ...]
    example: str
    stops: bool = False


def find_doubts(requests: Sequence[EditRequest]) -> list[Doubt]:
    """Return what is doubtful about facts, the worst first; without a model.

    Contradictions, repetitions, facts without a subject or an old answer, subjects that stand in the prompt twice or
    inside of a word.
    """
    contradictions: list[tuple[EditRequest, str]] = []
    first_with_text: dict[str, EditRequest] = {}
    for request in requests:
        first = first_with_text.setdefault(request.text, request)
        if first.target != request.target:
            contradictions.append(
                (request, f"{request.text!r} -> {request.target!r}, and {first.target!r} in {first.id}")
            )
    counts = Counter((request.text, request.target) for request in requests)
    repeated = [(r, f"{r.text!r} -> {r.target!r}") for r in unique(requests) if counts[r.text, r.target] > 1]
    without = [(r, repr(r.text)) for r in requests if r.subject is None]
    twice: list[tuple[EditRequest, str]] = []
    inside: list[tuple[EditRequest, str]] = []
    for request in requests:
        if request.subject is None:
            continue
        start, end = request.subject_span
        marked = f"{request.text[:start]}[{request.subject}]{request.text[end:]}"
        if request.text.count(request.subject) > 1:
            twice.append((request, marked))
        if _is_inside_word(request.text, start, end):
            inside.append((request, marked))
    no_truth = [(r, repr(r.text)) for r in requests if r.ground_truth is None]
    doubts = [
        _doubt("two targets for one prompt", contradictions, stops=True),
        _doubt("given more than once; each counts once", repeated),
        _doubt("without a subject; only some methods edit these", without),
        _doubt("subject stands in the prompt more than once; the marked one is edited", twice),
        _doubt("subject is part of a longer word", inside),
        _doubt("without an old answer; success (ES) cannot be scored", no_truth),
    ]
    return [doubt for doubt in doubts if doubt.ids]


def _doubt(kind: str, found: Sequence[tuple[EditRequest, str]], *, stops: bool = False) -> Doubt:
    return Doubt(kind, tuple(request.id for request, _ in found), found[0][1] if found else "", stops)


def _is_inside_word(text: str, start: int, end: int) -> bool:
    before, after = text[:start][-1:], text[end:][:1]
    first, last = text[start], text[end - 1]
    # Characters of scripts that are written without spaces belong to no longer word.
    joined_before = before.isalnum() and before.isascii() and first.isalnum()
    joined_after = after.isalnum() and after.isascii() and last.isalnum()
    return joined_before or joined_after


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


def propose_subject(view: ModelView, encoder: Encoder, request: EditRequest, spread: float) -> str:
    """Return the words of a prompt whose noise takes most away from what the model answers.

    Noise on the embeddings of a span makes the model's own answer unlikely where the span is what the answer is about
    (causal tracing, arXiv 2202.05262, section 2.1). The best single word is taken, and its neighbours as long as they
    add to the effect.

    Args:
        view: the model.
        encoder: its tokenizer.
        request: a fact without a subject.
        spread: standard deviation of embeddings; see :meth:`Tracer.spread_of`.
    """
    tracer = Tracer(view, encoder, spread=spread, samples=_SAMPLES, kinds=())
    words = list(re.finditer(r"\w+(?:[.'’-]\w+)*", request.text))

    def effect(first: int, last: int) -> float:
        """Return what noise on words ``first`` to ``last`` takes from the probability of the answer."""
        trace = tracer.trace(Known(request.text, (words[first].start(), words[last].end())))
        return trace.clean - trace.corrupted

    if not words:
        return request.text
    effects = [effect(index, index) for index in range(len(words))]
    first = last = max(range(len(words)), key=lambda index: effects[index])
    best = effects[first]
    while True:
        wider = [(first - 1, last), (first, last + 1)]
        measured = {span: effect(*span) for span in wider if span[0] >= 0 and span[1] < len(words)}
        span = max(measured, key=lambda span: measured[span], default=None)
        if span is None or measured[span] < _GROWTH * best:
            return request.text[words[first].start() : words[last].end()]
        (first, last), best = span, measured[span]


def with_subject(record: EditRecord, subject: str) -> EditRecord:
    """Return a record whose request names this subject."""
    return replace(record, request=replace(record.request, subject=subject, prompt=record.request.text))
