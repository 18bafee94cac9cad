"""Updates of one weight matrix, and how they are added to it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kecore.api.errors import NonFiniteError
from kecore.model.linear import MatrixName

__all__ = [
    "Dense",
    "LowRank",
    "Update",
    "factored",
    "factors_of",
    "numbers_of",
    "shape_of",
    "smallest_factors",
    "updated",
    "updated_parameter",
]

_ROUNDING = 1e-6  # of the largest singular value: what float32 factors say nothing about


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
        """Return the update as a matrix, ``[d_out, d_in]`` float32."""
        return self.U @ self.V.t()

    def norm(self) -> float:
        """Return the Frobenius norm, without forming the matrix."""
        u, v = self.U.double(), self.V.double()
        gram = (u.t() @ u) * (v.t() @ v)  # [r, r], whose sum is the squared norm
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
        """Return the update, ``[d_out, d_in]`` float32."""
        return self.delta

    def norm(self) -> float:
        """Return the Frobenius norm."""
        return float(self.delta.double().norm())


Update = LowRank | Dense


def factors_of(update: Update) -> tuple[Tensor, Tensor]:
    """Return ``U [d_out, r]`` and ``V [d_in, r]`` with ``U Vᵀ`` the update; of a dense one, itself and the identity."""
    if isinstance(update, LowRank):
        return update.U, update.V
    return update.delta, torch.eye(update.delta.shape[1])


def factored(u: Tensor, v: Tensor) -> Update:
    """Return ``U Vᵀ`` in as few numbers as it takes: thousands of facts have more columns than a matrix has.

    Args:
        u: ``[d_out, r]`` float32.
        v: ``[d_in, r]`` float32.
    """
    update = LowRank(u, v)
    return Dense(update.matrix()) if numbers_of(update) > len(u) * len(v) else update


def smallest_factors(update: Update, rank: int | None = None) -> tuple[LowRank, float]:
    """Factor an update anew by its singular values: in as few columns as hold it, or in its best ``rank`` columns.

    Many facts about few subjects, or edits one after another, have more columns than their update has directions.

    Args:
        update: the update.
        rank: columns, at the most; None for as many as float32 tells from rounding.

    Returns:
        The factors, and the share of the update's Frobenius norm that they do without, in [0, 1] (Eckart and Young).
    """
    u, v = factors_of(update)
    u_basis, u_rest = torch.linalg.qr(u.double())  # [d_out, k], [k, r] with k = min(d_out, r)
    v_basis, v_rest = torch.linalg.qr(v.double())
    left, singular, right = torch.linalg.svd(u_rest @ v_rest.t(), full_matrices=False)
    held = int((singular > _ROUNDING * singular.max()).sum()) if singular.numel() else 0
    kept = max(1, held if rank is None else min(rank, held))
    total = float(singular.norm())
    lost = float(singular[kept:].norm()) / total if total else 0.0
    root = singular[:kept].sqrt()  # both factors get the same scale, which half types need
    new_u = (u_basis @ left[:, :kept]) * root  # [d_out, kept]
    new_v = (v_basis @ right[:kept].t()) * root  # [d_in, kept]
    return LowRank(new_u.float(), new_v.float()), lost


def updated(name: str, data: Tensor, changes: Sequence[Update], transposed: bool) -> Tensor:
    """Return a weight with updates added in float32 and rounded once to its own type.

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


def updated_parameter(
    data: Tensor, changes: Mapping[MatrixName, Sequence[Update]], transposed: Collection[MatrixName]
) -> Tensor:
    """Return a parameter with updates added to its matrix, or to some of the matrices that it stacks.

    Args:
        data: the parameter as it is stored.
        changes: updates of each matrix, all of this one parameter, in ``[d_out, d_in]`` orientation.
        transposed: the matrices that are stored ``[d_in, d_out]``.

    Returns:
        New data; a matrix without updates has the bits that it had.

    Raises:
        NonFiniteError: the new weight overflows its type.
    """
    new = data
    for matrix, updates in changes.items():
        total = updated(str(matrix), matrix.of(data), updates, matrix in transposed)
        if matrix.index is None:
            return total
        if new is data:
            new = data.clone()
        new[matrix.index] = total
    return new


def shape_of(update: Update) -> tuple[int, int]:
    """Return ``(d_out, d_in)``."""
    if isinstance(update, LowRank):
        return int(update.U.shape[0]), int(update.V.shape[0])
    return int(update.delta.shape[0]), int(update.delta.shape[1])


def numbers_of(update: Update) -> int:
    """Return how many numbers an update is kept in."""
    if isinstance(update, LowRank):
        return update.U.numel() + update.V.numel()
    return update.delta.numel()
