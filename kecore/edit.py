"""The product of kecore: an edit, a small file that changes a model and can be taken off again.

A :class:`WeightEdit` holds low-rank factors for each changed matrix. Attaching computes the new weight once
from the *base* weight, in float32, and rounds once to the model's type; edits never pile up roundings.
Taking one off recomputes from the base with the edits that stay, so the order of taking off is free, and
with the last one gone the base weights are back bit for bit.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kecore._version import __version__
from kecore.errors import ArtifactError, ArtifactMismatchError, EditStateError, NonFiniteError
from kecore.files import read_tensors, write_tensors
from kecore.model_view.identity import DTYPES, Fingerprint, Identity, type_name
from kecore.types import EditRequest

__all__ = ["Dense", "Edit", "LowRank", "Update", "WeightEdit", "attached", "load_edit", "merge", "updated"]

_FILE = "edit.safetensors"
_FORMAT = 1


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The update ``U Vᵀ`` of a weight ``[d_out, d_in]``.

    Args:
        U: ``[d_out, r]`` float32.
        V: ``[d_in, r]`` float32.
    """

    U: Tensor
    V: Tensor

    @property
    def rank(self) -> int:
        """Columns of the factors."""
        return int(self.U.shape[1])

    def matrix(self) -> Tensor:
        """``[d_out, d_in]`` float32."""
        return self.U @ self.V.t()

    def norm(self) -> float:
        """Frobenius norm, without forming the matrix."""
        gram = (self.U.double().t() @ self.U.double()) * (self.V.double().t() @ self.V.double())
        return float(gram.sum().clamp(min=0).sqrt())


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A full-rank update, for methods that change a whole matrix.

    Args:
        delta: ``[d_out, d_in]`` float32.
    """

    delta: Tensor

    @property
    def rank(self) -> int:
        """The rank such a matrix can have."""
        return min(self.delta.shape)

    def matrix(self) -> Tensor:
        """``[d_out, d_in]`` float32."""
        return self.delta

    def norm(self) -> float:
        """Frobenius norm."""
        return float(self.delta.double().norm())


Update = LowRank | Dense


class Edit(ABC):
    """What a method returns and a user keeps: attach it, take it off, save it, share it."""

    kind: ClassVar[str]

    @abstractmethod
    def attach(self, model: nn.Module) -> None:
        """Put the edit on ``model``."""

    @abstractmethod
    def revert(self, model: nn.Module) -> None:
        """Take the edit off ``model``."""

    @abstractmethod
    def save(self, path: str | Path) -> Path:
        """Write the edit to a file."""

    @abstractmethod
    def inspect(self) -> dict[str, Any]:
        """What the edit is, as JSON values."""


@dataclass(frozen=True, eq=False)
class WeightEdit(Edit):
    """Updates of weight matrices.

    Args:
        updates: parameter name to update, in ``[d_out, d_in]`` orientation.
        transposed: names of parameters that the model stores as ``[d_in, d_out]``.
        base: fingerprint of the model that the edit was planned on.
        method: name of the method.
        config: the method's configuration as JSON values.
        requests: what was asked for.
        seed: seed of the plan.
        notes: figures of the plan worth keeping, as JSON values (condition numbers, layers, steps).
        state: tensors that the method needs for the next edit of a sequence.
        created: seconds since the epoch.
        version: kecore that made the edit.

    Raises:
        NonFiniteError: an update holds NaN or infinity.
    """

    updates: Mapping[str, Update]
    base: Fingerprint
    method: str
    transposed: frozenset[str] = frozenset()
    config: Mapping[str, Any] = field(default_factory=dict)
    requests: tuple[EditRequest, ...] = ()
    seed: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    created: float = field(default_factory=time.time)
    version: str = __version__

    kind: ClassVar[str] = "weight-edit"

    def __post_init__(self) -> None:
        for name, update in self.updates.items():
            parts = (update.U, update.V) if isinstance(update, LowRank) else (update.delta,)
            if not all(bool(torch.isfinite(part).all()) for part in parts):
                raise NonFiniteError(
                    f"the update of {name} holds NaN or infinity, so it was not attached; lower the learning rate "
                    "or edit the model in float32"
                )

    def attach(self, model: nn.Module, *, base: Identity | None = None) -> None:
        """Put the edit on ``model``; nothing is changed unless all of it can be.

        Args:
            model: the model the edit was planned on, in any weight type.
            base: identity of the unedited model, if it is at hand (saves hashing the weights).

        Raises:
            ArtifactMismatchError: the model is another one.
            EditStateError: the edit is attached already.
            NonFiniteError: the new weights overflow the model's type.
        """
        stack = _STACKS.setdefault(model, _Stack())
        if any(edit is self for edit in stack.edits):
            raise EditStateError("this edit is attached to the model already; revert it before attaching it again")
        self.check_base(model, base)
        stack.set(model, [*stack.edits, self])

    def revert(self, model: nn.Module) -> None:
        """Take the edit off; with no edit left the base weights are back bit for bit.

        Raises:
            EditStateError: the edit is not attached, or the weights were changed since by something else.
        """
        stack = _STACKS.get(model)
        if stack is None or not any(edit is self for edit in stack.edits):
            raise EditStateError("this edit is not attached to the model; attach it first")
        stack.set(model, [edit for edit in stack.edits if edit is not self])

    def check_base(self, model: nn.Module, base: Identity | None = None) -> None:
        """Refuse a model that the edit was not made for.

        Raises:
            ArtifactMismatchError: says what differs.
        """
        parameters = dict(model.named_parameters())
        for name, update in self.updates.items():
            if name not in parameters:
                raise ArtifactMismatchError(f"the edit changes {name}, which {type(model).__name__} does not have")
            shape = tuple(parameters[name].shape)
            matrix = tuple(reversed(shape)) if name in self.transposed else shape
            expected = _shape(update)
            if matrix != expected:
                raise ArtifactMismatchError(f"{name}: the edit is for {expected}, the model has {matrix}")
        stack = _STACKS.get(model)
        dtype = next(iter(parameters[name] for name in self.updates)).dtype if self.updates else torch.float32
        if type_name(dtype) not in DTYPES:
            raise ArtifactMismatchError(f"the model's weights are {dtype}; edits attach to {', '.join(DTYPES)}")
        with stack.lifted(model) if stack else nullcontext():
            difference = self.base.differs(base or Identity(model), dtype)
        if difference:
            raise ArtifactMismatchError(
                f"the edit was made for other weights: fingerprint {difference}; attach it to the model it was "
                "planned on, or edit this model anew"
            )

    def save(self, path: str | Path) -> Path:
        """Write the edit, atomically.

        Args:
            path: a file ending in ``.safetensors``, or a folder, in which ``edit.safetensors`` is written.

        Returns:
            The file.
        """
        path = Path(path)
        file = path if path.suffix == ".safetensors" else path / _FILE
        tensors: dict[str, Tensor] = {f"state/{name}": t for name, t in self.state.items()}
        for name, update in self.updates.items():
            if isinstance(update, LowRank):
                tensors |= {f"U/{name}": update.U, f"V/{name}": update.V}
            else:
                tensors[f"D/{name}"] = update.delta
        header = {
            "format": _FORMAT,
            "version": self.version,
            "created": self.created,
            "method": self.method,
            "config": dict(self.config),
            "seed": self.seed,
            "base": {"dtype": self.base.dtype, "digests": dict(self.base.digests)},
            "transposed": sorted(self.transposed),
            "notes": dict(self.notes),
            "requests": [request.to_json() for request in self.requests],
        }
        return write_tensors(file, self.kind, header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> WeightEdit:
        """Read an edit.

        Raises:
            ArtifactError: missing, truncated, corrupt, foreign, or from a newer kecore.
        """
        path = Path(path)
        header, tensors = read_tensors(path / _FILE if path.is_dir() else path, cls.kind, newest=_FORMAT)
        updates: dict[str, Update] = {}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            if part == "U":
                updates[name] = LowRank(tensor, tensors[f"V/{name}"])
            elif part == "D":
                updates[name] = Dense(tensor)
        return cls(
            updates=updates,
            base=Fingerprint(**header["base"]),
            method=header["method"],
            transposed=frozenset(header["transposed"]),
            config=header["config"],
            requests=tuple(EditRequest(**request) for request in header["requests"]),
            seed=header["seed"],
            notes=header["notes"],
            state={k.removeprefix("state/"): t for k, t in tensors.items() if k.startswith("state/")},
            created=header["created"],
            version=header["version"],
        )

    def inspect(self) -> dict[str, Any]:
        """Method, requests, and the size of each update, as JSON values."""
        return {
            "method": self.method,
            "version": self.version,
            "created": self.created,
            "seed": self.seed,
            "base": {"dtype": self.base.dtype, **self.base.digests},
            "config": dict(self.config),
            "notes": dict(self.notes),
            "updates": {
                name: {"shape": list(_shape(u)), "rank": u.rank, "norm": u.norm()} for name, u in self.updates.items()
            },
            "bytes": sum(4 * _numbers(u) for u in self.updates.values()),
            "requests": [request.to_json() for request in self.requests],
        }

    def diff(self, other: WeightEdit) -> dict[str, Any]:
        """How another edit differs: requests on one side only, and the distance of the updates."""
        mine, theirs = ({(r.text, r.target): r for r in e.requests} for e in (self, other))
        updates: dict[str, Any] = {}
        for name in sorted({*self.updates, *other.updates}):
            a, b = self.updates.get(name), other.updates.get(name)
            if a is None or b is None:
                updates[name] = {"only_in": "first" if b is None else "second"}
                continue
            x, y = a.matrix().double(), b.matrix().double()
            norms = float(x.norm()) * float(y.norm())
            updates[name] = {
                "distance": float((x - y).norm()),
                "cosine": float((x * y).sum()) / norms if norms else 0.0,
            }
        return {
            "same_base": self.base == other.base,
            "methods": [self.method, other.method],
            "only_in_first": [r.to_json() for key, r in mine.items() if key not in theirs],
            "only_in_second": [r.to_json() for key, r in theirs.items() if key not in mine],
            "updates": updates,
        }


def merge(edits: Sequence[WeightEdit]) -> WeightEdit:
    """One edit that does what several do together; ranks add up.

    Raises:
        ArtifactError: no edits.
        ArtifactMismatchError: the edits are for different base models.
    """
    if not edits:
        raise ArtifactError("no edits to merge; give at least one")
    first = edits[0]
    if any(edit.base.digests != first.base.digests for edit in edits):
        raise ArtifactMismatchError("the edits were made for different base models and cannot be merged")
    updates: dict[str, Update] = {}
    for name in dict.fromkeys(name for edit in edits for name in edit.updates):
        parts = [edit.updates[name] for edit in edits if name in edit.updates]
        if all(isinstance(part, LowRank) for part in parts):
            low = [part for part in parts if isinstance(part, LowRank)]
            updates[name] = LowRank(torch.cat([p.U for p in low], 1), torch.cat([p.V for p in low], 1))
        else:
            updates[name] = Dense(torch.stack([part.matrix() for part in parts]).sum(0))
    return WeightEdit(
        updates=updates,
        base=first.base,
        method="+".join(dict.fromkeys(edit.method for edit in edits)),
        transposed=frozenset().union(*(edit.transposed for edit in edits)),
        requests=tuple(request for edit in edits for request in edit.requests),
        notes={"merged": [dict(edit.notes) for edit in edits]},
    )


def load_edit(path: str | Path) -> WeightEdit:
    """Read an edit of whatever kind from a file or folder.

    Raises:
        ArtifactError: the file is missing, truncated, corrupt or foreign.
    """
    return WeightEdit.load(path)


def attached(model: nn.Module) -> tuple[Edit, ...]:
    """The edits that are on ``model`` now, in order."""
    stack = _STACKS.get(model)
    return tuple(stack.edits) if stack else ()


def _edited(model: nn.Module, edits: Sequence[WeightEdit], base: Mapping[str, Tensor]) -> dict[nn.Parameter, Tensor]:
    """New data of every parameter that ``edits`` change: base plus all updates in float32, rounded once.

    Args:
        model: the model.
        edits: in the order they were attached.
        base: data of the unedited parameters, by name.

    Raises:
        NonFiniteError: a new weight overflows the model's type.
    """
    parameters = dict(model.named_parameters())
    result: dict[nn.Parameter, Tensor] = {}
    for name in dict.fromkeys(name for edit in edits for name in edit.updates):
        changes = [edit.updates[name] for edit in edits if name in edit.updates]
        transposed = any(name in edit.transposed for edit in edits)
        result[parameters[name]] = updated(name, base[name], changes, transposed)
    return result


def updated(name: str, data: Tensor, changes: Sequence[Update], transposed: bool) -> Tensor:
    """A weight with updates added in float32 and rounded once to its own type.

    Args:
        name: for the error message.
        data: the weight as it is stored.
        changes: updates in ``[d_out, d_in]`` orientation.
        transposed: ``data`` is ``[d_in, d_out]``.

    Raises:
        NonFiniteError: the new weight overflows its type.
    """
    total = data.to(torch.float32, copy=True)
    for change in changes:
        matrix = change.matrix().to(total.device)
        total += matrix.t() if transposed else matrix
    new = total.to(data.dtype)
    if not bool(torch.isfinite(new).all()):
        raise NonFiniteError(f"{name} would overflow {data.dtype}; nothing was attached")
    return new


class _Stack:
    """The edits on one model, and the base data of the parameters they changed."""

    def __init__(self) -> None:
        self.edits: list[WeightEdit] = []
        self.base: dict[str, Tensor] = {}
        self.current: dict[str, tuple[Tensor, tuple[int, int]]] = {}

    def set(self, model: nn.Module, edits: list[WeightEdit]) -> None:
        parameters = dict(model.named_parameters())
        for name, (data, mark) in self.current.items():
            if _touched(parameters[name], data, mark):
                raise EditStateError(
                    f"{name} was changed by something else since the edit was attached; kecore will not overwrite "
                    "that change"
                )
        names = dict.fromkeys(name for edit in edits for name in edit.updates)
        base = {name: self.base.get(name, parameters[name].data) for name in names}
        base = {name: data.to(parameters[name].data) for name, data in base.items()}
        new = _edited(model, edits, base)
        # Nothing can fail from here on: the model is never left half-edited.
        for name, data in self.base.items():
            parameters[name].data = data.to(parameters[name].data)
        for parameter, data in new.items():
            parameter.data = data
        self.edits, self.base = edits, base
        self.current = {name: (parameters[name].data, _mark(parameters[name])) for name in names}

    def lifted(self, model: nn.Module) -> Any:
        """Context in which the base weights are in place."""
        from kecore.model_view.hooks import overlaid

        parameters = dict(model.named_parameters())
        return overlaid({parameters[name]: data for name, data in self.base.items()})


# Keyed by the model object itself and gone with it, so nothing leaks from one model to another.
_STACKS: WeakKeyDictionary[nn.Module, _Stack] = WeakKeyDictionary()


def _touched(parameter: nn.Parameter, data: Tensor, mark: tuple[int, int]) -> bool:
    """Whether a parameter was written since; a move to another device or type is not a change."""
    if parameter.data_ptr() == data.data_ptr():
        return _mark(parameter) != mark
    return not torch.equal(parameter.data, data.to(parameter.data))


def _mark(parameter: nn.Parameter) -> tuple[int, int]:
    """Changes when a parameter is written: torch's own count, which misses writes to ``.data``, and a sum of bits."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[parameter.element_size()]
    return parameter._version, int(parameter.data.view(bits).sum(dtype=torch.int64))


def _shape(update: Update) -> tuple[int, int]:
    if isinstance(update, LowRank):
        return int(update.U.shape[0]), int(update.V.shape[0])
    return int(update.delta.shape[0]), int(update.delta.shape[1])


def _numbers(update: Update) -> int:
    return update.U.numel() + update.V.numel() if isinstance(update, LowRank) else update.delta.numel()
