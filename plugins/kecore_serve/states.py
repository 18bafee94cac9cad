"""What methods remember between edits, kept with a ledger: each edit stores only what it changed.

A method's state is a set of named tensors: keys of earlier edits, running moments, second moments. An edit's file of
state holds the tensors that it wrote; all others stand in the files of the edits before it. So a thousand edits keep
their keys once, and the state behind any of them can be read bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kecore.api.errors import ArtifactError
from kecore.files import file_digest, read_tensors, write_tensors
from kecore_serve.records import Entry, StateRecord

__all__ = ["KIND", "read_state", "write_state"]

KIND = "method-state"


def write_state(
    folder: Path, id_: str, parent: str | None, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> StateRecord:
    """Write what an edit changed in its method's state.

    Args:
        folder: the ledger's.
        id_: the edit.
        parent: the edit whose state the method began with; None for an empty one.
        before: that state.
        after: the state that the edit left.

    Raises:
        StorageError: the disk is full, or the place is not writable.
    """
    written = {name: tensor for name, tensor in after.items() if not _is_same(tensor, before.get(name))}
    removed = tuple(name for name in before if name not in after)
    if not written:
        return StateRecord(parent=parent, removed=removed)
    path = folder / "states" / f"{id_}.safetensors"
    write_tensors(path, KIND, {"edit": id_}, written)
    file = path.relative_to(folder).as_posix()
    return StateRecord(parent, file, file_digest(path), tuple(written), removed)


def _is_same(tensor: Tensor, other: Tensor | None) -> bool:
    if tensor is other:
        return True
    return other is not None and tensor.dtype == other.dtype and torch.equal(tensor.cpu(), other.cpu())


def read_state(folder: Path, entries: Mapping[str, Entry], id_: str | None) -> dict[str, Tensor]:
    """Return the state that an edit left, bit for bit; nothing for None.

    Args:
        folder: the ledger's.
        entries: its edits, by id.
        id_: the edit.

    Raises:
        ArtifactError: a file is missing or damaged.
    """
    owners: dict[str, str] = {}  # name of a tensor to the last edit that wrote it
    chain = ancestors(entries, id_)
    for edit in chain:
        record = entries[edit].state
        for name in record.removed:
            owners.pop(name, None)
        owners.update(dict.fromkeys(record.written, edit))
    files: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Tensor] = {}
    for name, owner in owners.items():
        if owner not in files:
            files[owner] = _read(folder, entries[owner])
        if name not in files[owner]:
            raise ArtifactError(f"{folder / str(entries[owner].state.file)} lacks {name}; restore it from a copy")
        state[name] = files[owner][name]
    return state


def ancestors(entries: Mapping[str, Entry], id_: str | None) -> list[str]:
    """Return the edits on whose states an edit's state builds, oldest first, itself last."""
    chain: list[str] = []
    while id_ is not None:
        chain.append(id_)
        id_ = entries[id_].state.parent
    return chain[::-1]


def _read(folder: Path, entry: Entry) -> dict[str, Tensor]:
    if entry.state.file is None:
        return {}
    return read_tensors(folder / entry.state.file, KIND)[1]
