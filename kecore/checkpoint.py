"""Checkpoints that carry edits, and what is needed to take them off again.

:func:`write_checkpoint` writes a complete checkpoint with a folder ``kecore/`` inside, which model loaders do not
look at: ``attached.json`` (which edits, which base), the edits themselves, and ``base.safetensors``, the original data
of the few matrices that the edits change. :func:`take_off_edits` puts these back and proves by fingerprint that the
base is there bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kecore._version import __version__
from kecore.api.errors import ArtifactError, EditStateError, RequestConflictError
from kecore.api.identity import Fingerprint, Identity
from kecore.api.progress import ShowStage, show_nothing
from kecore.api.types import EditRequest, check_conflicts
from kecore.edit import Edit, WeightEdit, attached, load_edit, unedited
from kecore.edit.weight import same_content
from kecore.files import check_new_folder, read_tensors, write_folder, write_json, write_tensors
from kecore.model.attachment import Attachment
from kecore.models import LoadedModel, reference_of, save_model

__all__ = ["Attached", "NamedEdit", "Written", "attach_edits", "read_record", "take_off_edits", "write_checkpoint"]

FOLDER, RECORD, BASE = "kecore", "attached.json", "base.safetensors"
_KIND = "base-weights"
_FORMAT = 1


@dataclass(frozen=True)
class NamedEdit:
    """An edit of weights and where it came from.

    Args:
        edit: the edit.
        source: the path that it was read from.
    """

    edit: WeightEdit
    source: str

    @classmethod
    def read(cls, path: str | Path, source: str = "") -> NamedEdit:
        """Read an edit file or folder.

        Raises:
            ArtifactError: missing, truncated, corrupt or foreign, or an edit that changes no weights.
        """
        return cls(_as_weight_edit(load_edit(path), str(path)), source or str(path))

    def to_json(self, file: str) -> dict[str, Any]:
        """Return what a checkpoint's record says about it."""
        requests = [f"{request.text} -> {request.target}" for request in self.edit.requests]
        fields = {"id": self.edit.id, "method": self.edit.method, "requests": requests}
        return {"file": file, "source": self.source, **fields}

    def was_planned_with(self, other: NamedEdit) -> bool:
        """Return whether another edit was on the model when this one was planned."""
        return other.edit.id in self.edit.notes.get("planned_with", ())


def _as_weight_edit(edit: Edit, name: str) -> WeightEdit:
    if not isinstance(edit, WeightEdit):
        raise ArtifactError(
            f"{name}: an edit of method '{edit.method}' leaves the weights alone, so no checkpoint can carry it; "
            "`kecore chat MODEL --edit EDIT` uses it, and in Python load_edit(path).attach(model)"
        )
    return edit


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
        """Read the edits themselves.

        Raises:
            ArtifactError: one is missing or broken.
        """
        return [NamedEdit.read(self.folder / FOLDER / item["file"], item["source"]) for item in self.edits]

    def check_numbers(self, numbers: Iterable[int] = ()) -> list[int]:
        """Return numbers of edits, counted from 1, in order; all of them where none is given.

        Raises:
            ArtifactError: there is no edit of a number.
        """
        known = range(1, len(self.edits) + 1)
        chosen = sorted(set(numbers)) or list(known)
        for number in chosen:
            if number not in known:
                raise ArtifactError(f"{self.folder} carries edits 1 to {len(known)}, there is no edit {number}")
        return chosen

    def numbers_of(self, ids: Iterable[str]) -> list[int]:
        """Return the numbers of edits by the beginnings of their ids.

        Raises:
            ArtifactError: no edit's id begins so, or several ids do.
        """
        known = [item.get("id") or named.edit.id for item, named in zip(self.edits, self.load_edits(), strict=True)]
        numbers: list[int] = []
        for beginning in ids:
            matches = [number for number, id_ in enumerate(known, 1) if beginning and id_.startswith(beginning)]
            if len(matches) != 1:
                what = "no edit" if not matches else f"{len(matches)} edits"
                raise ArtifactError(f"{self.folder} carries {what} of id {beginning!r}; it has: {', '.join(known)}")
            numbers += matches
        return numbers

    def base_data(self, model: nn.Module) -> dict[str, Tensor]:
        """Read the original data of the matrices that the edits changed, by parameter name.

        Raises:
            ArtifactError: it is missing, broken, or of other shapes than the model.
        """
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


@dataclass(frozen=True)
class Written(Attached):
    """The record of a checkpoint that was just written; see :class:`Attached`.

    Args:
        parameters: names of the parameters that the edits change.
    """

    parameters: tuple[str, ...]


def digest(model: nn.Module) -> str:
    """Return the fingerprint of all weights, as they are stored."""
    return Identity(model).of()


def read_record(ref: str | Path) -> Attached | None:
    """Read the record of a checkpoint that carries edits; return None for any other model.

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


def need_record(ref: str | Path) -> Attached:
    """Read the record of a checkpoint that carries edits.

    Raises:
        ArtifactError: there is none, or it cannot be read.
    """
    record = read_record(ref)
    if record is None:
        raise ArtifactError(
            f"{ref} carries no record of edits, so there is nothing to take off; expected a directory that "
            "`kecore attach` wrote. MODEL itself is never changed by kecore"
        )
    return record


def write_checkpoint(
    model: Any, tokenizer: Any, out: str | Path, *, ref: str = "", sources: Sequence[str] = ()
) -> Written:
    """Write a model as a checkpoint with the record of the edits that are on it; it appears whole or not at all.

    Any program that reads Hugging Face checkpoints can load it. Of a model without edits it is a plain checkpoint.

    Args:
        model: a transformers model with its edits attached.
        tokenizer: its tokenizer.
        out: a directory that is not there yet, or empty.
        ref: the reference of the base model; by default that which it was loaded by.
        sources: where each edit was read from, for the record; by default its file in the checkpoint.

    Raises:
        ArtifactError: ``out`` is something else, or an edit changes no weights.
        StorageError: the disk is full, or the place is not writable.
    """
    out = Path(out)
    check_new_folder(out)
    edits = [_as_weight_edit(edit, f"edit {number}") for number, edit in enumerate(attached(model), 1)]
    files = [f"edit-{number}.safetensors" for number in range(1, len(edits) + 1)]
    named = [NamedEdit(edit, source) for edit, source in zip(edits, sources or files, strict=True)]
    parameters = tuple(dict.fromkeys(name for edit in edits for name in edit.parameters))
    with unedited(model):
        base_digest = digest(model)
    record = Written(
        folder=out,
        model=ref or reference_of(model),
        base=base_digest,
        edited=digest(model),
        edits=tuple(item.to_json(file) for item, file in zip(named, files, strict=True)),
        parameters=parameters,
    )
    with write_folder(out) as folder:
        save_model(model, tokenizer, folder)
        if edits:
            for edit, file in zip(edits, files, strict=True):
                edit.save(folder / FOLDER / file)
            base_data = Attachment.of(model).base_data(parameters)
            write_tensors(folder / FOLDER / BASE, _KIND, {"format": _FORMAT}, base_data)
            summary = {"model": record.model, "base": record.base, "edited": record.edited, "edits": record.edits}
            write_json(folder / FOLDER / RECORD, {"format": _FORMAT, "version": __version__, **summary})
    return record


def attach_edits(
    loaded: LoadedModel,
    edits: Iterable[NamedEdit | str | Path],
    out: str | Path,
    *,
    show: ShowStage = show_nothing,
) -> Written:
    """Put edits on a model and write it with :func:`write_checkpoint`.

    The model may itself be such a checkpoint: its edits stay, and new ones join them, be they made for the same base or
    for the edited checkpoint. The weights are those of the base and all updates, summed in float32 and rounded once.

    Args:
        loaded: the model, with nothing attached; the edits stay on it.
        edits: edits of weights, or their files or folders.
        out: a directory that is not there yet, or empty.
        show: shows the stages ``restore``, ``attach`` and ``save``.

    Raises:
        ArtifactError: an edit cannot be read, or changes no weights; or ``out`` holds something.
        ArtifactMismatchError: an edit was made for another model.
        RequestConflictError: two edits for the same base give one prompt two targets.
        EditStateError: the checkpoint was changed since its edits were attached, or an edit would be on it twice.
        StorageError: the disk is full, or the place is not writable.
    """
    check_new_folder(Path(out))
    named = [edit if isinstance(edit, NamedEdit) else NamedEdit.read(edit) for edit in edits]
    ref, record = loaded.ref, read_record(loaded.ref)
    if record is not None:
        with show("restore", f"finding the base of {ref}"):
            edited = Identity(loaded.model)
            later = [item for item in named if not item.edit.base.differs(edited, _dtype(loaded.model))]
            earlier = record.load_edits()
            record.restore(loaded.model)
            if later:
                base = Fingerprint.of(Identity(loaded.model), _dtype(loaded.model))
                named = [_on_base(item, base, earlier) if item in later else item for item in named]
            ref, named = record.model, [*earlier, *named]
    _check_together(named)
    return _attach_and_write(loaded, named, out, ref, show)


def take_off_edits(
    loaded: LoadedModel, out: str | Path, numbers: Iterable[int] = (), *, show: ShowStage = show_nothing
) -> Written:
    """Take edits off a checkpoint that carries them, bit for bit, and write what is left.

    Args:
        loaded: the checkpoint, which may not have been changed since the edits were attached.
        out: a directory that is not there yet, or empty.
        numbers: which edits to take off, counted from 1; by default all.
        show: shows the stages ``restore``, ``attach`` and ``save``.

    Raises:
        ArtifactError: the model carries no record of edits, or no such edit; or ``out`` holds something.
        EditStateError: the checkpoint was changed since its edits were attached.
        StorageError: the disk is full, or the place is not writable.
    """
    check_new_folder(Path(out))
    record = need_record(loaded.ref)
    removed = record.check_numbers(numbers)
    remaining = [edit for number, edit in enumerate(record.load_edits(), 1) if number not in removed]
    with show("restore", "putting the base weights back"):
        record.restore(loaded.model)
    return _attach_and_write(loaded, remaining, out, record.model, show)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _on_base(named: NamedEdit, base: Fingerprint, earlier: Sequence[NamedEdit]) -> NamedEdit:
    """Return an edit that was planned on an edited checkpoint as one of that checkpoint's base, beside its edits."""
    planned_with = [*named.edit.notes.get("planned_with", ()), *(item.edit.id for item in earlier)]
    notes = {**named.edit.notes, "planned_with": list(dict.fromkeys(planned_with))}
    return NamedEdit(replace(named.edit, base=base, notes=notes), named.source)


def _attach_and_write(
    loaded: LoadedModel, edits: Sequence[NamedEdit], out: str | Path, ref: str, show: ShowStage
) -> Written:
    noun = "edit" if len(edits) == 1 else "edits"
    with show("attach", f"attaching {len(edits)} {noun}" if edits else "no edits left to attach"):
        identity = Identity(loaded.model)
        for named in edits:
            named.edit.attach(loaded.model, base=identity)
    with show("save", f"writing {out}"):
        sources = [named.source for named in edits]
        return write_checkpoint(loaded.model, loaded.tokenizer, out, ref=ref, sources=sources)


def _check_together(edits: Sequence[NamedEdit]) -> None:
    """Refuse edits of one base that do not go together: their updates are summed.

    An edit may contradict an earlier one that was on the model when it was planned: it takes that one's place.
    """
    for position, named in enumerate(edits):
        for earlier in edits[:position]:
            if same_content(earlier.edit, named.edit):
                raise EditStateError(
                    f"'{named.source}' is the same edit as '{earlier.source}', and on the model twice it would count "
                    "twice; give it once"
                )
            if not named.was_planned_with(earlier):
                _check_requests([*earlier.edit.requests, *named.edit.requests])


def _check_requests(requests: Sequence[EditRequest]) -> None:
    if not requests:
        return
    try:
        check_conflicts(requests)
    except RequestConflictError as error:
        raise RequestConflictError(
            f"{error}. These edits were planned on one base, and together they would write neither; take the older one "
            "off (`kecore revert`), or plan the newer one with the older one on the model (`kecore edit --with EDIT`)"
        ) from error
