"""Checkpoints that carry edits, and what is needed to take them off again.

``kecore attach`` writes a complete checkpoint with a folder ``kecore/`` inside, which model loaders do not look
at: ``attached.json`` (which edits, which base), the edits themselves, and ``base.safetensors``, the original
data of the few matrices that the edits change. ``kecore revert`` puts these back and proves by fingerprint that
the base is there bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kecore._version import __version__
from kecore.api.errors import ArtifactError, EditStateError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kecore.edit import WeightEdit

__all__ = ["Attached", "NamedEdit", "check_out", "read_record", "write_checkpoint"]

FOLDER, RECORD, BASE = "kecore", "attached.json", "base.safetensors"
_KIND = "base-weights"
_FORMAT = 1


@dataclass(frozen=True)
class NamedEdit:
    """An edit and where it came from.

    Args:
        edit: the edit.
        source: the path that it was read from.
    """

    edit: WeightEdit
    source: str

    @classmethod
    def read(cls, path: Path, source: str = "") -> NamedEdit:
        """An edit file or folder.

        Raises:
            ArtifactError: missing, truncated, corrupt or foreign, or an edit that changes no weights.
        """
        from kecore.edit import WeightEdit, load_edit

        edit = load_edit(path)
        if not isinstance(edit, WeightEdit):
            raise ArtifactError(
                f"{path}: an edit of method '{edit.method}' leaves the weights alone, so no checkpoint can carry it; "
                "`kecore chat MODEL --edit EDIT` uses it, and in Python load_edit(path).attach(model)"
            )
        return cls(edit, source or str(path))

    def to_json(self, file: str) -> dict[str, Any]:
        """What a checkpoint's record says about it."""
        requests = [f"{request.text} -> {request.target}" for request in self.edit.requests]
        return {"file": file, "source": self.source, "method": self.edit.method, "requests": requests}


@dataclass(frozen=True)
class Attached:
    """The record of a checkpoint's edits.

    Args:
        folder: the checkpoint.
        model: the reference of the model that the edits were attached to.
        base: digest of its weights as they were stored.
        edited: digest of the weights with the edits.
        edits: a summary of each edit, oldest first.
    """

    folder: Path
    model: str
    base: str
    edited: str
    edits: tuple[dict[str, Any], ...]

    def load_edits(self) -> list[NamedEdit]:
        """The edits themselves.

        Raises:
            ArtifactError: one is missing or broken.
        """
        return [NamedEdit.read(self.folder / FOLDER / item["file"], item["source"]) for item in self.edits]

    def base_data(self, model: nn.Module) -> dict[str, Tensor]:
        """Original data of the matrices that the edits changed, by parameter name.

        Raises:
            ArtifactError: it is missing, broken, or of other shapes than the model.
        """
        from kecore.files import read_tensors

        path = self.folder / FOLDER / BASE
        _, tensors = read_tensors(path, _KIND)
        parameters = dict(model.named_parameters())
        for name, tensor in tensors.items():
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise ArtifactError(f"{path} holds {name} {tuple(tensor.shape)}, which the model does not have")
        return {name: tensor.to(parameters[name].device) for name, tensor in tensors.items()}

    def restore(self, model: nn.Module) -> None:
        """Put the base weights back, bit for bit.

        Raises:
            EditStateError: the checkpoint was changed since the edits were attached.
            ArtifactError: the original data is missing or broken, or does not give the base.
        """
        if digest(model) != self.edited:
            raise EditStateError(
                f"{self.folder} was changed since its edits were attached; taking them off would lose that change"
            )
        parameters = dict(model.named_parameters())
        for name, data in self.base_data(model).items():
            parameters[name].data = data
        if digest(model) != self.base:
            raise ArtifactError(f"{self.folder / FOLDER / BASE} does not give back the weights of '{self.model}'")


def digest(model: nn.Module) -> str:
    """Fingerprint of all weights, as they are stored."""
    from kecore.api.identity import Identity

    return Identity(model).of()


def read_record(ref: str | Path) -> Attached | None:
    """The record of a checkpoint that ``kecore attach`` wrote; None for any other model.

    Raises:
        ArtifactError: the record cannot be read.
    """
    folder = Path(ref).expanduser()
    path = folder / FOLDER / RECORD
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] > _FORMAT:
            raise ArtifactError(
                f"{path} was written by kecore {values['version']}; install that version or a newer one"
            )
        return Attached(folder, values["model"], values["base"], values["edited"], tuple(values["edits"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is truncated or not kecore's ({error}); attach the edits anew") from error


def check_out(out: Path) -> None:
    """Refuse a folder that a checkpoint cannot be written to.

    Raises:
        ArtifactError: it exists and is not an empty directory.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"{out} exists and is not empty; name a new directory")


def write_checkpoint(
    model: Any, tokenizer: Any, out: Path, *, ref: str = "", edits: Sequence[NamedEdit] = (),
    base: Mapping[str, Tensor] | None = None, base_digest: str = "",
) -> Path:  # fmt: skip
    """Write a checkpoint with the record of its edits; it appears whole or not at all.

    Args:
        model: with the edits on it.
        tokenizer: its tokenizer.
        out: a directory that is not there yet, or empty.
        ref: the reference of the base model.
        edits: what is on the model; none for a plain checkpoint.
        base: original data of the parameters that the edits change.
        base_digest: of the weights without the edits.

    Raises:
        StorageError: the disk is full, or the place is not writable.
    """
    from kecore.files import explain_write_errors, write_json, write_tensors
    from kecore.models import save_model

    with explain_write_errors(out), _staging(out) as staging:
        made = save_model(model, tokenizer, staging / "checkpoint")
        if edits:
            files = [f"edit-{number}.safetensors" for number in range(1, len(edits) + 1)]
            for item, file in zip(edits, files, strict=True):
                item.edit.save(made / FOLDER / file)
            write_tensors(made / FOLDER / BASE, _KIND, {"format": _FORMAT}, base or {})
            values = {
                "format": _FORMAT,
                "version": __version__,
                "model": ref,
                "base": base_digest,
                "edited": digest(model),
                "edits": [item.to_json(file) for item, file in zip(edits, files, strict=True)],
            }
            write_json(made / FOLDER / RECORD, values)
        if out.is_dir():
            out.rmdir()  # empty; some systems do not rename onto a directory
        os.replace(made, out)
    return out


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder on the disk of ``out`` that is gone when the block ends."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
