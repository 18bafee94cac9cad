"""The facts that an edit has to hold where it replaces what the session's earlier edits put on the model."""

from __future__ import annotations

from kecore.api.method import MethodContext
from kecore.api.types import EditRequest
from kecore.batch import RequestBatch

__all__ = ["session_facts"]


def session_facts(batch: RequestBatch, context: MethodContext) -> tuple[EditRequest, ...]:
    """Return the facts of this method's earlier edits, then the new ones.

    A new fact takes the place of an earlier one about the same prompt. New ones are sorted, since the order of a batch
    means nothing.

    Args:
        batch: the new facts.
        context: knows the earlier edits.
    """
    new_prompts = {request.text for request in batch.requests}
    earlier: list[EditRequest] = []
    for edit in context.earlier:
        earlier += [request for request in edit.requests if request.text not in new_prompts]
    new = sorted(batch.requests, key=lambda request: (request.text, request.id))
    return (*earlier, *new)
