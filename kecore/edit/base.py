"""Edit: what all edits have in common, and which of them are on a model."""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kecore._version import __version__
from kecore.api.errors import ArtifactMismatchError, EditStateError
from kecore.api.identity import DTYPES, Fingerprint, Identity, type_name
from kecore.api.show import html_table, shorten
from kecore.api.types import EditRequest
from kecore.files import read_tensors, write_tensors
from kecore.hub import EDIT, artifact_file
from kecore.model.attachment import Attachment

__all__ = ["Edit", "attached", "set_edits", "unedited"]

_FORMAT = 1
_STATE = "state/"


_FIELDS: dict[str, Any] = {
    "method": str,
    "config": Mapping,
    "seed": int,
    "notes": Mapping,
    "created": (int, float),
    "version": str,
}
"""What the fields of a file's header have to be."""


def _read_base(values: Mapping[str, Any]) -> Fingerprint:
    """Return the fingerprint that a file names, once it is one: texts only.

    Raises:
        TypeError: it is none.
    """
    base = Fingerprint(**values)
    items: list[Any] = [base.dtype, *base.digests, *base.digests.values()]  # a file may hold anything
    if not all(isinstance(item, str) for item in items):
        raise TypeError("'base' holds something else than texts")
    return base


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Edit(ABC):
    """An edit is what a method returns and a user keeps: attach it, take it off, save it, share it.

    Args:
        base: fingerprint of the model that the edit was planned on.
        method: name of the method.
        config: the method's configuration as JSON values.
        requests: what was asked for.
        seed: seed of the plan.
        notes: figures of the plan worth keeping, as JSON values (condition numbers, layers, steps).
        state: tensors that the method needs for the next edit of a sequence.
        created: seconds since the epoch.
        version: kecore that made the edit.
        model: reference of the model that the edit was planned on, as it was loaded; empty where it is not known. A
            fingerprint says which weights these are, and this where to find them.
    """

    base: Fingerprint
    method: str
    config: Mapping[str, Any] = field(default_factory=dict)
    requests: tuple[EditRequest, ...] = ()
    seed: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    created: float = field(default_factory=time.time)
    version: str = __version__
    model: str = ""

    kind: ClassVar[str]
    """The kind of edit, as a file names it."""

    def __repr__(self) -> str:
        return f"<{self._title()}>"

    def _repr_html_(self) -> str:
        rows = [(request.text, request.target, request.ground_truth or "") for request in self.requests]
        return html_table(self._title(), ("prompt", "target", "instead of"), rows)

    def _title(self) -> str:
        """Say in a line what the edit is."""
        base = self.base.digests.get(self.base.dtype, "")[:12]
        return f"{type(self).__name__} by {self.method}: {self._facts()}, for weights {base} ({self.base.dtype})"

    def _facts(self) -> str:
        """Say which facts the edit is of: the one, or how many."""
        if len(self.requests) == 1:
            return f"{shorten(self.requests[0].text)!r} -> {shorten(self.requests[0].target)!r}"
        return f"{len(self.requests)} facts"

    @cached_property
    def id(self) -> str:
        """A short name that the edit keeps wherever it is copied to: 12 hexadecimal digits.

        It is a digest of when, by what and for what the edit was planned.
        """
        planned = [self.created, self.method, self.seed, [request.to_json() for request in self.requests]]
        return hashlib.sha256(json.dumps(planned, sort_keys=True).encode()).hexdigest()[:12]

    def is_copy_of(self, other: Edit) -> bool:
        """Return whether both are one edit, perhaps read from its file twice: planned at one moment, for one thing."""
        if self is other:
            return True
        mine = (self.created, self.method, self.seed, self.base, self.requests)
        return mine == (other.created, other.method, other.seed, other.base, other.requests)

    def attach(self, model: nn.Module, *, base: Identity | None = None) -> None:
        """Put the edit on ``model``; nothing is changed unless all of it can be.

        Args:
            model: the model the edit was planned on, in any weight type.
            base: identity of the unedited model, if it is at hand (saves hashing the weights).

        Raises:
            ArtifactMismatchError: the model is another one.
            EditStateError: the edit is attached already.
            NonFiniteError: new weights overflow the model's type.
        """
        attachment = Attachment.of(model)
        if any(self.is_copy_of(edit) for edit in attachment.edits):
            raise EditStateError("this edit is attached to the model already; revert it before attaching it again")
        self.check_base(model, base)
        edits = (*attachment.edits, self)
        self._set(model, edits)
        attachment.edits = edits

    def revert(self, model: nn.Module) -> None:
        """Take the edit off; with no edit left the model is what it was, bit for bit.

        Raises:
            EditStateError: the edit is not attached, or the weights were changed since by something else.
        """
        attachment = Attachment.of(model)
        remaining = tuple(edit for edit in attachment.edits if edit is not self)
        if len(remaining) == len(attachment.edits):
            raise EditStateError("this edit is not attached to the model; attach it first")
        self._set(model, remaining)
        attachment.edits = remaining

    def acts_beside(self, model: nn.Module) -> bool:
        """Return whether the edit, or a part of it, acts on ``model`` through hooks and has ``install``."""
        del model
        return False

    @abstractmethod
    def _set(self, model: nn.Module, edits: tuple[Edit, ...]) -> None:
        """Let those of ``edits`` that are of this edit's kind, and no others of it, be on the model; all or nothing."""

    def check_base(self, model: nn.Module, base: Identity | None = None) -> None:
        """Refuse a model that the edit was not made for.

        Raises:
            ArtifactMismatchError: says what differs.
        """
        dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
        if type_name(dtype) not in DTYPES:
            raise ArtifactMismatchError(f"the model's weights are {dtype}; edits attach to {', '.join(DTYPES)}")
        with unedited(model):
            difference = self.base.differs(base or Identity(model), dtype)
        if difference:
            name = getattr(model, "name_or_path", "") or type(model).__name__
            raise ArtifactMismatchError(
                f"the edit by {self.method} ({self._facts()}) was made for other weights than those of '{name}': "
                f"fingerprint {difference}; attach it to the model it was planned on, or edit this model anew"
            )

    def save(self, path: str | Path) -> Path:
        """Write the edit, atomically.

        Args:
            path: a file ending in ``.safetensors``, or a folder, in which ``edit.safetensors`` is written.

        Returns:
            The file.
        """
        path = Path(path)
        file = path if path.suffix == ".safetensors" else path / EDIT
        tensors = {_STATE + name: tensor for name, tensor in self.state.items()}
        content, header_fields = self._content()
        header = {
            "format": _FORMAT,
            "version": self.version,
            "created": self.created,
            "method": self.method,
            "model": self.model,
            "config": dict(self.config),
            "seed": self.seed,
            "base": {"dtype": self.base.dtype, "digests": dict(self.base.digests)},
            "notes": dict(self.notes),
            "requests": [request.to_json() for request in self.requests],
            **header_fields,
        }
        return write_tensors(file, self.kind, header, tensors | content)

    @abstractmethod
    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what only this kind of edit has: tensors by name, and JSON values for the header."""

    @classmethod
    def _read(cls, path: str | Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
        """Return the common fields of a file as arguments, its header, and the tensors that only this kind has."""
        header, tensors = read_tensors(artifact_file(path, EDIT), cls.kind, newest=_FORMAT)
        state = {name.removeprefix(_STATE): tensors.pop(name) for name in list(tensors) if name.startswith(_STATE)}
        fields = {name: header[name] for name in ("method", "config", "seed", "notes", "created", "version")}
        for name, kind in _FIELDS.items():
            if not isinstance(fields[name], kind):
                raise TypeError(f"'{name}' is {type(fields[name]).__name__}")
        requests = tuple(EditRequest(**request) for request in header["requests"])
        common = {
            **fields,
            "model": str(header.get("model", "")),  # older files have none
            "base": _read_base(header["base"]),
            "requests": requests,
            "state": state,
        }
        return common, header, tensors

    def inspect(self) -> dict[str, Any]:
        """Return what the edit is, as JSON values."""
        return {
            "id": self.id,
            "method": self.method,
            "model": self.model,
            "version": self.version,
            "created": self.created,
            "seed": self.seed,
            "base": {"dtype": self.base.dtype, **self.base.digests},
            "config": dict(self.config),
            "notes": dict(self.notes),
            "requests": [request.to_json() for request in self.requests],
        }

    def diff(self, other: Edit) -> dict[str, Any]:
        """Return how another edit differs: method, base, and requests on one side only."""
        mine = {(request.text, request.target): request for request in self.requests}
        theirs = {(request.text, request.target): request for request in other.requests}
        return {
            "same_base": self.base == other.base,
            "methods": [self.method, other.method],
            "only_in_first": [request.to_json() for key, request in mine.items() if key not in theirs],
            "only_in_second": [request.to_json() for key, request in theirs.items() if key not in mine],
        }


def set_edits(model: nn.Module, edits: Sequence[Edit], *, base: Identity | None = None) -> None:
    """Let exactly these edits be on ``model``, in this order; all of them or, on failure, those of before.

    The result is that of taking all others off and attaching these one by one, bit for bit, in one go.

    Args:
        model: the model the edits were planned on, in any weight type.
        edits: the edits; those that are attached already stay.
        base: identity of the unedited model, if it is at hand (saves hashing the weights).

    Raises:
        ArtifactMismatchError: the model is another one.
        EditStateError: an edit is given twice, or the weights were changed by something else.
        NonFiniteError: new weights overflow the model's type.
    """
    attachment = Attachment.of(model)
    before, after = attachment.edits, tuple(edits)
    if len({edit.id for edit in after}) < len(after):
        raise EditStateError("an edit is given twice; on the model twice it would count twice")
    for edit in after:
        if edit not in before:
            edit.check_base(model, base)
    kinds = {edit.kind: edit for edit in (*before, *after)}  # one of each kind, which sets all of its kind
    done: list[Edit] = []
    try:
        for edit in kinds.values():
            edit._set(model, after)  # pyright: ignore[reportPrivateUsage]
            done.append(edit)
    except BaseException:
        for edit in done:
            edit._set(model, before)  # pyright: ignore[reportPrivateUsage]
        raise
    attachment.edits = after


def attached(model: nn.Module) -> tuple[Edit, ...]:
    """Return the edits that are on ``model`` now, in the order in which they were attached."""
    return Attachment.of(model).edits


def unedited(model: nn.Module) -> AbstractContextManager[None]:
    """Put the weights of the unedited model in place inside the block, whatever edits are attached."""
    return Attachment.of(model).unedited()
