"""How methods that put a module beside the model begin and end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kecore.api.method import MethodContext
from kecore.api.types import EditRequest, check_conflicts, unique
from kecore.edit import ModuleEdit, SideModule
from kecore.engine.tuning import encoded
from kecore.model import ModelView

__all__ = ["accepted", "side_edit"]


def accepted(requests: Sequence[EditRequest], context: MethodContext) -> list[EditRequest]:
    """Each request once.

    Raises:
        RequestError: two of them contradict each other, or one does not fit; before anything takes long.
    """
    check_conflicts(requests)
    asked = unique(requests)
    encoded(context.encoder, asked)
    return asked


def side_edit(
    effect: SideModule,
    view: ModelView,
    context: MethodContext,
    method: str,
    requests: Sequence[EditRequest],
    notes: Mapping[str, Any],
) -> ModuleEdit:
    """The edit of a module that holds what the session's earlier edits put there as well."""
    return ModuleEdit(
        effect=effect,
        supersedes=True,
        base=context.fingerprint(view),
        method=method,
        config=context.config.to_json(),
        requests=tuple(requests),
        seed=context.seed,
        notes=dict(notes),
    )
