"""The product of kecore: an edit, a small file that changes a model and can be taken off again.

A :class:`WeightEdit` holds updates of matrices, a :class:`ModuleEdit` what acts beside an unchanged model, a
:class:`PromptEdit` what is put before its prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kecore.api.errors import ArtifactError
from kecore.edit.base import Edit, attached, set_edits, unedited
from kecore.edit.effect import (
    Effect,
    ModuleEdit,
    PromptEdit,
    PromptWriter,
    Reader,
    SideModule,
    acting,
    suspended,
    without_edits,
    written,
)
from kecore.edit.updates import Dense, LowRank, Update, factored, factors_of, updated
from kecore.edit.weight import WeightEdit, merge, planned_updates
from kecore.files import read_kind
from kecore.hub import EDIT, artifact_file

__all__ = [
    "Dense",
    "Edit",
    "Effect",
    "LowRank",
    "ModuleEdit",
    "PromptEdit",
    "PromptWriter",
    "Reader",
    "SideModule",
    "Update",
    "WeightEdit",
    "acting",
    "attached",
    "factored",
    "factors_of",
    "load_edit",
    "merge",
    "planned_updates",
    "set_edits",
    "suspended",
    "unedited",
    "updated",
    "without_edits",
    "written",
]


def load_edit(path: str | Path, method: type[Any] | None = None) -> Edit:
    """Read an edit of whatever kind.

    Args:
        path: a file, a folder that holds ``edit.safetensors``, or ``hf:OWNER/NAME[@REVISION]`` on the Hugging Face hub.
        method: the class that made an edit of modules or prompts; by default the installed method of that name.

    Raises:
        ArtifactError: the file is missing, truncated, corrupt or foreign.
        HubError: the hub cannot be reached, or has no such edit.
        MethodNotFoundError: the method that reads it is not installed.
    """
    file = artifact_file(path, EDIT)
    match read_kind(file, "edit"):
        case ModuleEdit.kind:
            return ModuleEdit.load(file, method)
        case PromptEdit.kind:
            return PromptEdit.load(file, method)
        case WeightEdit.kind:
            return WeightEdit.load(file)
        case other:
            raise ArtifactError(f"{file}: expected a kecore edit, got a kecore {other}")
