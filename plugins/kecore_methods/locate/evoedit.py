"""EvoEdit: AlphaEdit, whose null space shrinks by the keys of every edit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor

from kecore.api.method import MethodContext
from kecore.engine.accumulate import Past
from kecore.ops import Solution, kv_solve
from kecore_methods.locate.alphaedit import InNullSpace, Projected

__all__ = ["EvoEdit", "outside"]


class EvoEdit(InNullSpace):
    """Sequential null-space alignment: earlier edits' keys leave the space that updates live in.

    AlphaEdit weighs earlier keys against the new ones in one system that grows. Here an update cannot reach them, and
    its system is as large as its own edit.
    """

    class Config(InNullSpace.Config):
        """Configuration of EvoEdit."""

        occupied: float = Field(
            default=0.1,
            gt=0,
            description="A direction is taken if an earlier edit's keys hold more in it than this share of a mean "
            "squared key.",
        )

    name = "evoedit"
    reference = (
        "Lyu et al., EvoEdit: Evolving Null-space Alignment for Robust and Efficient Knowledge Editing, 2025, "
        "arXiv:2510.13851"
    )

    def write(self, new: Projected, ridge: float, context: MethodContext) -> Solution:
        """Leave the span of earlier edits' keys, then solve for this edit alone."""
        config: EvoEdit.Config = context.config
        # The group that each column belongs to, [c].
        groups = torch.arange(len(new.subjects)) if new.shares is None else new.shares.argmax(1)
        # A later request about a subject takes precedence, or its key would have no room left.
        earlier_keys = Past(context.state, new.site, new.subjects).take(new.keys, groups)
        free_keys = outside(earlier_keys, new.keys, config.occupied * new.size)
        return kv_solve(free_keys, new.residuals, ridge, shares=new.shares)


def outside(taken: Iterable[Tensor], keys: Tensor, threshold: float) -> Tensor:
    """Return keys without the directions that earlier edits' keys took (EvoEdit, arXiv 2510.13851).

    With ``P_0`` the identity and ``Q_s`` the left singular vectors of ``P_{s-1} K_s`` whose squared singular values
    exceed the threshold, ``P_s = P_{s-1} - Q_s Q_sᵀ``; what is returned is ``P_t keys``. ``P_s`` is stored as the basis
    ``Q`` of ``I - Q Qᵀ``, which is as large as there are directions.

    Args:
        taken: ``[d_in, n_s]``, the keys of each edit before, in their order.
        keys: ``[d_in, c]``, the new edit's.
        threshold: an edit takes a direction if its keys' squared components along it add up to more than this.

    Returns:
        ``[d_in, c]`` float32.
    """
    basis = torch.zeros(len(keys), 0, dtype=torch.float64)  # [d_in, directions], orthonormal
    for earlier_keys in taken:
        free = _project_out(earlier_keys, basis)  # [d_in, n_s]
        # The eigenvectors of the small Gram matrix give the left singular vectors: K v / sigma.
        squares, vectors = torch.linalg.eigh(free.t() @ free)  # [n_s], [n_s, n_s]
        strong = squares > threshold
        directions = free @ (vectors[:, strong] * squares[strong].rsqrt())
        basis = torch.cat([basis, directions], 1)
    return _project_out(keys, basis).float()


def _project_out(columns: Tensor, basis: Tensor) -> Tensor:
    """Return columns ``[d_in, n]`` without what they hold in an orthonormal basis, float64."""
    return columns.double() - basis @ (basis.t() @ columns.double())
