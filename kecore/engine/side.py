"""How every method that puts a module beside the model begins and ends."""

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
    """Return each request once.

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
    """Return the edit of a side module, which also holds what the session's earlier edits put there.

    Args:
        effect: the module.
        view: the unedited model.
        context: gives fingerprint, configuration and seed.
        method: name of the method.
        requests: the facts of this edit.
        notes: what the method reports about it.
    """
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
