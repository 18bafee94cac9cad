"""Where a request's subject stands in tokens, for every context: one rule for all methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kecore.api.types import EditRequest
from kecore.engine.contexts import joined
from kecore.text import Encoded, Encoder

__all__ = ["Located", "group_by_subject", "locate"]


@dataclass(frozen=True, slots=True)
class Located:
    """One prompt as tokens, with the token that the edit acts on.

    Args:
        encoded: the tokens, with or without the target.
        lookup: index of the subject's last token.
        request: index of the request.
        context: index of the context.
    """

    encoded: Encoded
    lookup: int
    request: int
    context: int


def locate(
    encoder: Encoder, requests: Sequence[EditRequest], contexts: Sequence[str], *, target: bool
) -> list[Located]:
    """Tokenise every request in every context and find the subject's last token.

    Args:
        encoder: text to tokens.
        requests: the edits.
        contexts: prefixes; the empty one is the bare prompt.
        target: put the target behind the prompt.

    Returns:
        ``len(requests) * len(contexts)`` items, contexts innermost.
    """
    found: list[Located] = []
    for index, request in enumerate(requests):
        start, end = request.subject_span
        for place, context in enumerate(contexts):
            text = joined(context, request.text)
            shift = len(text) - len(request.text)
            encoded = encoder.encode(text, request.target if target else "")
            lookup = encoded.last_token_of((start + shift, end + shift))
            found.append(Located(encoded, lookup, index, place))
    return found


def group_by_subject(requests: Sequence[EditRequest]) -> list[int]:
    """Group index of each request: requests about one subject share one key, so they must share one value.

    Solving them apart gives one key several values, of which none is written (MEMIT-Merge, arXiv 2502.07322).
    """
    groups: dict[str, int] = {}
    return [groups.setdefault(request.subject, len(groups)) for request in requests]
