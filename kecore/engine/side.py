"""How methods that put a module beside the model end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kecore.api.method import MethodContext
from kecore.api.types import EditRequest
from kecore.edit import ModuleEdit, SideModule
from kecore.model import ModelView

__all__ = ["side_edit"]


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
