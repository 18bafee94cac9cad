"""Facts as they are given to a session, and what can be said of them before they are edited."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

from kecore.api.errors import RequestError
from kecore.api.progress import Progress
from kecore.api.types import EditRecord, EditRequest, unique

if TYPE_CHECKING:
    from kecore.model import ModelView
    from kecore.text import Encoder

__all__ = ["Facts", "FactsReport", "as_records", "as_requests", "report_facts", "without_overlap"]

Facts: TypeAlias = EditRequest | EditRecord | Iterable[EditRequest | EditRecord]
"""One or more facts, with or without probes of other prompts."""


@dataclass(frozen=True, slots=True)
class FactsReport:
    """What can be said of facts before they are edited.

    Args:
        requests: all requests, as they were given.
        known: those that ask for what the model answers already.
        repeated: those that were given more than once, each listed once.
    """

    requests: tuple[EditRequest, ...]
    known: tuple[EditRequest, ...]
    repeated: tuple[EditRequest, ...]


def as_records(facts: Facts) -> list[EditRecord]:
    """Return facts as records; a request alone becomes one without probes of other prompts.

    Raises:
        RequestError: something else than requests and records was given.
    """
    items: list[Any] = [facts]
    if isinstance(facts, Iterable) and not isinstance(facts, str | Mapping):
        items = list(facts)
    for item in items:
        if not isinstance(item, EditRequest | EditRecord):
            raise RequestError(
                f"expected an EditRequest or an EditRecord, got {type(item).__name__} {reprlib.repr(item)}; make one "
                "by EditRequest(prompt, subject, target), or read them with load_records"
            )
    return [EditRecord(item) if isinstance(item, EditRequest) else item for item in items]


def as_requests(facts: Facts) -> list[EditRequest]:
    """Return the requests of facts, in order.

    Raises:
        RequestError: something else than requests and records was given.
    """
    return list(chain.from_iterable(record.requests for record in as_records(facts)))


def without_overlap(pool: Iterable[EditRecord], records: Iterable[EditRecord]) -> list[EditRecord]:
    """Return the records of a pool that share no prompt with others, so that no demonstration shows what is asked.

    Args:
        pool: records that demonstrations are taken from.
        records: what is edited and asked.
    """
    asked = {prompt for record in records for prompt in _prompts(record)}
    return [record for record in pool if asked.isdisjoint(_prompts(record))]


def _prompts(record: EditRecord) -> list[str]:
    """Return all prompts of a record: its requests' and its probes'."""
    return [*(request.text for request in record.requests), *(probe.prompt for probe in record.probes)]


def report_facts(
    view: ModelView, encoder: Encoder, requests: Sequence[EditRequest], *, batch_tokens: int, progress: Progress
) -> FactsReport:
    """Ask the model for each request's target, and look for requests that are repeated.

    Args:
        view: the model as it is now.
        encoder: its tokenizer.
        requests: the facts.
        batch_tokens: padded tokens of a micro-batch.
        progress: called after each micro-batch.
    """
    from kecore.inference import score_continuations

    pairs = [(request.text, request.target) for request in requests]
    scores = score_continuations(view, encoder, pairs, batch_tokens=batch_tokens, progress=progress)
    # A score is exact where every token of the target is the model's first choice.
    known = [request for request, score in zip(requests, scores, strict=True) if score.exact]
    counts = Counter((request.prompt, request.subject, request.target) for request in requests)
    repeated: list[EditRequest] = []
    for request in unique(requests):
        if counts[request.prompt, request.subject, request.target] > 1:
            repeated.append(request)
    return FactsReport(tuple(requests), tuple(known), tuple(repeated))
