"""What is doubtful about facts, as their author should know before they are edited."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kecore.api.types import EditRecord, EditRequest, unique
from kecore.evaluate.spelling import fold
from kecore.text import Encoder

__all__ = ["LONG_TARGET", "Doubt", "find_doubts", "find_target_doubts"]

LONG_TARGET = 24
"""Tokens of a target above which methods that write one value at the subject seldom write it to its end."""
_LABELS = frozenset(("0", "1", "true", "false", "yes", "no"))
"""Targets that are labels of a classifier more often than answers to what stands before them."""
_TURNS = "earlier turns"
"""The note that holds the beginning of a chat."""


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


@dataclass(frozen=True, slots=True)
class _Case:
    """A request that a doubt is about, and the doubt in words."""

    request: EditRequest
    words: str


def find_doubts(records: Sequence[EditRecord]) -> list[Doubt]:
    """Return what is doubtful about facts, the worst first; without a model.

    Contradictions and repetitions, also in two spellings; chats of which only the last reply is edited; facts without a
    subject or an old answer; files whose targets are labels only; subjects that stand in the prompt twice or inside of
    a word.
    """
    requests = [request for record in records for request in record.requests]
    kinds: list[tuple[str, list[_Case]]] = [
        ("given more than once; each counts once", _repetitions(requests)),
        ("two targets for one prompt in two spellings; a model hardly tells them apart", _rivals_in_spelling(requests)),
        ("a chat of which the last reply alone is edited, without the turns before", _chats(records)),
        ("target is a label; is it what the model should say behind the prompt?", _labels(requests)),
        ("without a subject; only some methods edit these", _without_subject(requests)),
        ("subject stands in the prompt more than once; the marked one is edited", _where(requests, _is_ambiguous)),
        ("subject is part of a longer word", _where(requests, _is_inside_word)),
        ("without an old answer; success (ES) cannot be scored", _without_truth(requests)),
    ]
    doubts = [_doubt("two targets for one prompt", _rivals(requests), stops=True)]
    doubts += [_doubt(kind, cases) for kind, cases in kinds]
    return [doubt for doubt in doubts if doubt.ids]


def find_target_doubts(encoder: Encoder, requests: Sequence[EditRequest]) -> list[Doubt]:
    """Return what is doubtful about targets as a model's tokenizer divides them.

    Targets with tokens that stand for nothing known, targets of many tokens, and targets with characters that take
    several tokens each, such as emoji.
    """
    unknown: list[_Case] = []
    long: list[_Case] = []
    split: list[_Case] = []
    for request in requests:
        encoded = encoder.encode(request.text, request.target)
        ids = encoded.ids[encoded.start :]
        if encoder.tokenizer.unk_token_id in ids:
            unknown.append(_Case(request, repr(request.target)))
        if len(ids) > LONG_TARGET:
            long.append(_Case(request, f"{len(ids)} tokens: {request.target!r:.60}"))
        pieces = [encoder.tokenizer.decode([token]) for token in ids]
        parts = sum(1 for piece in pieces if "\ufffd" in piece and "\ufffd" not in request.target)
        if parts:
            split.append(_Case(request, f"{parts} of {len(ids)} tokens hold parts of characters: {request.target!r}"))
    doubts = [
        _doubt("target holds what the tokenizer has no token for; no method can write it", unknown, stops=True),
        _doubt(
            f"target of more than {LONG_TARGET} tokens; methods that write one value at the subject seldom write it "
            "to its end",
            long,
        ),
        _doubt(
            "target has characters of several tokens, such as emoji; methods that write one value at the subject may "
            "leave them half",
            split,
        ),
    ]
    return [doubt for doubt in doubts if doubt.ids]


def _doubt(kind: str, cases: Sequence[_Case], *, stops: bool = False) -> Doubt:
    example = cases[0].words if cases else ""
    return Doubt(kind, tuple(case.request.id for case in cases), example, stops)


def _rivals(requests: Sequence[EditRequest]) -> list[_Case]:
    """Return requests whose prompt has another target in an earlier one."""
    cases: list[_Case] = []
    first_with_text: dict[str, EditRequest] = {}
    for request in requests:
        first = first_with_text.setdefault(request.text, request)
        if first.target != request.target:
            cases.append(_Case(request, _both(first, request)))
    return cases


def _rivals_in_spelling(requests: Sequence[EditRequest]) -> list[_Case]:
    """Return requests whose prompt has another target in an earlier one that only spells it in another way."""
    cases: list[_Case] = []
    first_with_text: dict[str, EditRequest] = {}
    for request in requests:
        first = first_with_text.setdefault(fold(request.text), request)
        if first.text != request.text and fold(first.target) != fold(request.target):
            cases.append(_Case(request, _both(first, request)))
    return cases


def _both(first: EditRequest, second: EditRequest) -> str:
    prompt = "" if first.text == second.text else f"{second.text!r} -> "
    return f"{first.text!r} -> {first.target!r} ({first.id}) and {prompt}{second.target!r} ({second.id})"


def _repetitions(requests: Sequence[EditRequest]) -> list[_Case]:
    counts = Counter((fold(request.text), fold(request.target)) for request in requests)
    cases: dict[tuple[str, str], _Case] = {}
    for request in unique(requests):
        key = (fold(request.text), fold(request.target))
        if counts[key] > 1:
            cases.setdefault(key, _Case(request, f"{request.text!r} -> {request.target!r}"))
    return list(cases.values())


def _chats(records: Sequence[EditRecord]) -> list[_Case]:
    return [_Case(record.request, repr(record.request.text)) for record in records if _TURNS in record.notes]


def _labels(requests: Sequence[EditRequest]) -> list[_Case]:
    """Return all requests of a file where each target is a label behind a prompt that does not ask for one.

    A file of statements with labels, such as ``{"prompt": "Lions fly", "label": 0}``, is read without complaint, and a
    model edited with it says "Lions fly 0".
    """
    if not all(fold(request.target) in _LABELS for request in requests):
        return []
    statements = [request for request in requests if not request.text.rstrip().endswith(("?", ":"))]
    return [_Case(request, f"{request.text!r} -> {request.target!r}") for request in statements]


def _without_subject(requests: Sequence[EditRequest]) -> list[_Case]:
    return [_Case(request, repr(request.text)) for request in requests if request.subject is None]


def _without_truth(requests: Sequence[EditRequest]) -> list[_Case]:
    return [_Case(request, repr(request.text)) for request in requests if request.ground_truth is None]


def _where(requests: Sequence[EditRequest], test: Callable[[EditRequest], bool]) -> list[_Case]:
    """Return the requests with a subject that a test is true of, with the subject marked."""
    cases: list[_Case] = []
    for request in requests:
        if request.subject is not None and test(request):
            start, end = request.subject_span
            cases.append(_Case(request, f"{request.text[:start]}[{request.subject}]{request.text[end:]}"))
    return cases


def _is_ambiguous(request: EditRequest) -> bool:
    return fold(request.text).count(fold(request.subject or "")) > 1


def _is_inside_word(request: EditRequest) -> bool:
    start, end = request.subject_span
    before, after = request.text[:start][-1:], request.text[end:][:1]
    first, last = request.text[start], request.text[end - 1]
    # Characters of scripts that are written without spaces belong to no longer word.
    joined_before = before.isalnum() and before.isascii() and first.isalnum()
    joined_after = after.isalnum() and after.isascii() and last.isalnum()
    return joined_before or joined_after
