"""Edits of weights.

Attaching computes the new weight once from the *base* weight, in float32, and rounds once to the model's type;
edits never pile up roundings. Taking one off recomputes from the base with the edits that stay, so the order of
taking off is free, and with the last one gone the base weights are back bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kecore.api.errors import ArtifactError, ArtifactMismatchError, NonFiniteError, UnsupportedCapabilityError
from kecore.api.identity import Identity
from kecore.api.method import MethodContext
from kecore.api.types import EditRequest
from kecore.edit.base import Edit
from kecore.edit.effect import set_beside
from kecore.edit.updates import Dense, LowRank, Update, factored, factors_of, numbers_of, shape_of, updated_parameter
from kecore.files import explain_content_errors
from kecore.model import MatrixName, ModelView, SiteId
from kecore.model.attachment import Attachment
from kecore.model.linear import is_packed

__all__ = ["WeightEdit", "merge", "planned_updates"]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class WeightEdit(Edit):
    """Updates of weight matrices.

    Args:
        updates: name of a matrix to its update, in ``[d_out, d_in]`` orientation. The name is that of a parameter,
            or of one of the matrices that a parameter stacks; see :class:`~kecore.model.MatrixName`.
        transposed: names of matrices that the model stores as ``[d_in, d_out]``.

    Raises:
        NonFiniteError: an update holds NaN or infinity.
    """

    updates: Mapping[str, Update]
    transposed: frozenset[str] = frozenset()

    kind: ClassVar[str] = "weight-edit"

    @classmethod
    def planned(
        cls,
        view: ModelView,
        updates: Mapping[SiteId, Update],
        context: MethodContext,
        *,
        method: str,
        requests: Sequence[EditRequest],
        notes: Mapping[str, Any],
    ) -> WeightEdit:
        """Return the edit that a method planned for some sites of a model.

        Args:
            view: the model.
            updates: site to update, in ``[d_out, d_in]`` orientation.
            context: what the method was given: the edit keeps its configuration, seed and state.
            method: the method's name.
            requests: what was asked for.
            notes: figures of the plan worth keeping, as JSON values.

        Raises:
            NonFiniteError: an update holds NaN or infinity.
        """
        linears = {site: view.site(site).linear for site in updates}
        return cls(
            updates={linears[site].name: update for site, update in updates.items()},
            base=context.fingerprint(view),
            method=method,
            transposed=frozenset(linear.name for linear in linears.values() if linear.transposed),
            config=context.config.to_json(),
            requests=tuple(requests),
            seed=context.seed,
            notes=notes,
            state=dict(context.state),
        )

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that the edit changes, in order."""
        return tuple(dict.fromkeys(MatrixName.parse(name).parameter for name in self.updates))

    def __post_init__(self) -> None:
        for name, update in self.updates.items():
            tensors = [update.U, update.V] if isinstance(update, LowRank) else [update.delta]
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                raise NonFiniteError(
                    f"the update of {name} holds NaN or infinity, so it was not attached; lower the learning rate "
                    "or edit the model in float32"
                )

    def check_base(self, model: nn.Module, base: Identity | None = None) -> None:
        """Refuse a model that the edit was not made for.

        Raises:
            ArtifactMismatchError: says what differs.
        """
        parameters = dict(model.named_parameters())
        for name, update in self.updates.items():
            if packed_module(model, name) is not None:
                continue  # which has no shape of its own to compare
            matrix_name = MatrixName.parse(name)
            stored = parameters.get(matrix_name.parameter)
            if stored is None or (matrix_name.index is not None and matrix_name.index >= len(stored)):
                raise ArtifactMismatchError(f"the edit changes {name}, which {type(model).__name__} does not have")
            shape = tuple(matrix_name.of(stored).shape)
            matrix = tuple(reversed(shape)) if name in self.transposed else shape
            expected = shape_of(update)
            if matrix != expected:
                raise ArtifactMismatchError(f"{name}: the edit is for {expected}, the model has {matrix}")
        super().check_base(model, base)

    def _set(self, model: nn.Module, edits: Sequence[Edit]) -> None:
        weight_edits = [edit for edit in edits if isinstance(edit, WeightEdit)]
        attachment = Attachment.of(model)
        attachment.check_weights()
        new_weights = _edited_weights(attachment, weight_edits)
        set_beside(model, edits)
        attachment.write_weights(new_weights)

    stands_for_weights: ClassVar[bool] = True

    def acts_beside(self, model: nn.Module) -> bool:
        """Return whether the model keeps one of the matrices packed in fewer bits, so that it cannot be written."""
        return any(packed_module(model, name) is not None for name in self.updates)

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Let the updates of quantised matrices act beside them, and return the handles of the hooks."""
        handles: list[RemovableHandle] = []
        for name, update in self.updates.items():
            module = packed_module(model, name)
            if module is not None:
                handles.append(module.register_forward_hook(_SideUpdate(update)))
        return handles

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        for name, update in self.updates.items():
            if isinstance(update, LowRank):
                tensors |= {f"U/{name}": update.U, f"V/{name}": update.V}
            else:
                tensors[f"D/{name}"] = update.delta
        return tensors, {"transposed": sorted(self.transposed)}

    @classmethod
    def load(cls, path: str | Path) -> WeightEdit:
        """Read an edit.

        Raises:
            ArtifactError: missing, truncated, corrupt, foreign, or from a newer kecore.
        """
        with explain_content_errors(path, "edit"):
            common, header, tensors = cls._read(path)
            return cls(updates=_read_updates(tensors), transposed=frozenset(header["transposed"]), **common)

    def inspect(self) -> dict[str, Any]:
        """Return method, requests, and the size of each update, as JSON values."""
        return {
            **super().inspect(),
            "updates": {
                name: {"shape": list(shape_of(u)), "rank": u.rank, "norm": u.norm()} for name, u in self.updates.items()
            },
            "bytes": sum(4 * numbers_of(u) for u in self.updates.values()),
        }

    def diff(self, other: Edit) -> dict[str, Any]:
        """Return how another edit differs: requests on one side only, and the distance of the updates."""
        updates: dict[str, Any] = {}
        theirs = other.updates if isinstance(other, WeightEdit) else {}
        for name in sorted({*self.updates, *theirs}):
            a, b = self.updates.get(name), theirs.get(name)
            if a is None or b is None:
                updates[name] = {"only_in": "first" if b is None else "second"}
                continue
            x, y = a.matrix().double(), b.matrix().double()
            norms = float(x.norm()) * float(y.norm())
            updates[name] = {
                "distance": float((x - y).norm()),
                "cosine": float((x * y).sum()) / norms if norms else 0.0,
            }
        return {**super().diff(other), "updates": updates}


def merge(edits: Sequence[Edit]) -> WeightEdit:
    """Return one edit that does what several do together; ranks add up, until a whole matrix takes less room.

    Raises:
        ArtifactError: no edits, or one edit twice, which would double it.
        ArtifactMismatchError: the edits are for different base models.
        UnsupportedCapabilityError: an edit changes no weights.
    """
    if not edits:
        raise ArtifactError("no edits to merge; give at least one")
    weight_edits = [_mergeable(edit, number) for number, edit in enumerate(edits, 1)]
    for number, edit in enumerate(weight_edits):
        for earlier_number, earlier in enumerate(weight_edits[:number]):
            if same_content(earlier, edit):
                raise ArtifactError(
                    f"edits {earlier_number + 1} and {number + 1} are the same edit by '{edit.method}', and merging it "
                    "with itself would double it; give it once"
                )
    return _merged(weight_edits)


def _mergeable(edit: Edit, number: int) -> WeightEdit:
    if not isinstance(edit, WeightEdit):
        raise UnsupportedCapabilityError(
            f"edit {number}, by '{edit.method}', changes no weights and cannot be merged with others; attach it beside "
            "them (`edit.attach(model)`)"
        )
    return edit


def same_content(first: WeightEdit, second: WeightEdit) -> bool:
    """Return whether two edits do the same to the same weights."""
    if first is second:
        return True
    if first.base.digests != second.base.digests or list(first.updates) != list(second.updates):
        return False
    if first.requests != second.requests:
        return False
    for name, update in first.updates.items():
        u, v = factors_of(update)
        other_u, other_v = factors_of(second.updates[name])
        if not (torch.equal(u, other_u) and torch.equal(v, other_v)):
            return False
    return True


def _merged(edits: Sequence[WeightEdit]) -> WeightEdit:
    first = edits[0]
    if any(edit.base.digests != first.base.digests for edit in edits):
        raise ArtifactMismatchError("the edits were made for different base models and cannot be merged")
    updates: dict[str, Update] = {}
    for name in dict.fromkeys(name for edit in edits for name in edit.updates):
        changes = [edit.updates[name] for edit in edits if name in edit.updates]
        low_rank = [change for change in changes if isinstance(change, LowRank)]
        if len(low_rank) == len(changes):
            u = torch.cat([change.U for change in low_rank], 1)  # [d_out, sum of ranks]
            v = torch.cat([change.V for change in low_rank], 1)  # [d_in, sum of ranks]
            updates[name] = factored(u, v)
        else:
            updates[name] = Dense(torch.stack([change.matrix() for change in changes]).sum(0))
    return WeightEdit(
        updates=updates,
        base=first.base,
        method="+".join(dict.fromkeys(edit.method for edit in edits)),
        transposed=frozenset().union(*(edit.transposed for edit in edits)),
        requests=tuple(request for edit in edits for request in edit.requests),
        model=first.model,
        notes={"merged": [dict(edit.notes) for edit in edits]},
    )


def _edited_weights(attachment: Attachment, edits: Sequence[WeightEdit]) -> dict[str, Tensor]:
    """Return new data of every parameter that ``edits`` change: base plus all updates in float32, rounded once.

    Args:
        attachment: what is on the model.
        edits: in the order in which they were attached.

    Raises:
        NonFiniteError: a new weight overflows the model's type.
    """
    changes: dict[str, dict[MatrixName, list[Update]]] = {}
    transposed: set[MatrixName] = set()
    for edit in edits:
        transposed |= {MatrixName.parse(name) for name in edit.transposed}
        for name, update in edit.updates.items():
            if packed_module(attachment.model, name) is not None:
                continue  # it acts beside its matrix
            matrix = MatrixName.parse(name)
            changes.setdefault(matrix.parameter, {}).setdefault(matrix, []).append(update)
    base = attachment.base_data(changes)
    return {name: updated_parameter(base[name], matrices, transposed) for name, matrices in changes.items()}


class _SideUpdate:
    """A hook that adds an update's product to what a linear map returns.

    Args:
        update: of the map's matrix.
    """

    def __init__(self, update: Update) -> None:
        u, v = factors_of(update)
        # Laid out alike wherever they come from: products of other strides are rounded in another order.
        self.u = u.clone(memory_format=torch.contiguous_format)  # [d_out, r]
        self.v = v.clone(memory_format=torch.contiguous_format)  # [d_in, r]

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return ``output + U Vᵀ x`` in the output's type."""
        x = args[0]
        if self.u.device != x.device:
            self.u, self.v = self.u.to(x.device), self.v.to(x.device)
        return output + ((x.to(self.v.dtype) @ self.v) @ self.u.t()).to(output.dtype)


def packed_module(model: nn.Module, name: str) -> nn.Module | None:
    """Return the module that keeps the matrix of a name packed in fewer bits; None where it is a plain parameter."""
    path = name.removesuffix(".weight")
    if path == name:
        return None
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return module if is_packed(module) else None


@contextmanager
def planned_updates(view: ModelView, updates: Mapping[SiteId, Update]) -> Iterator[None]:
    """Let updates of some sites act inside the block: written over their matrices, or beside those that are packed.

    Raises:
        NonFiniteError: a new weight overflows the model's type.
    """
    plain: dict[SiteId, Update] = {}
    with ExitStack() as stack:
        for site, update in updates.items():
            linear = view.site(site).linear
            if linear.packed is None:
                plain[site] = update
            else:
                stack.callback(linear.module.register_forward_hook(_SideUpdate(update)).remove)
        stack.enter_context(view.overlay(_planned_weights(view, plain)))
        yield


def _planned_weights(view: ModelView, updates: Mapping[SiteId, Update]) -> dict[nn.Parameter, Tensor]:
    """Return the data that parameters would have with updates of some sites, for :meth:`ModelView.overlay`.

    Raises:
        NonFiniteError: a new weight overflows the model's type.
    """
    changes: dict[nn.Parameter, dict[MatrixName, list[Update]]] = {}
    transposed: set[MatrixName] = set()
    for site, update in updates.items():
        linear = view.site(site).linear
        changes.setdefault(linear.parameter, {})[linear.matrix_name] = [update]
        if linear.transposed:
            transposed.add(linear.matrix_name)
    return {
        parameter: updated_parameter(parameter.data, matrices, transposed) for parameter, matrices in changes.items()
    }


def _read_updates(tensors: Mapping[str, Tensor]) -> dict[str, Update]:
    """Return the updates of a file's tensors, by parameter.

    Raises:
        ValueError: they are no factors of one matrix, or no matrix.
        KeyError: a factor is alone.
    """
    updates: dict[str, Update] = {}
    for key, tensor in tensors.items():
        factor, _, name = key.partition("/")
        if factor not in ("U", "V", "D") or tensor.ndim != 2 or not tensor.is_floating_point():
            raise ValueError(f"the tensor '{key}' {list(tensor.shape)} is no factor of an update")
        if factor == "U":
            other = tensors[f"V/{name}"]
            if other.ndim != 2 or other.shape[1] != tensor.shape[1]:
                raise ValueError(f"the factors of '{name}' are {list(tensor.shape)} and {list(other.shape)}")
            updates[name] = LowRank(tensor, other)
        elif factor == "D":
            updates[name] = Dense(tensor)
    return updates
