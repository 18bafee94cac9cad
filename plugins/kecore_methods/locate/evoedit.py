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

    AlphaEdit weighs them against the new ones in one growing system; here they are out of reach of an update whose
    system has the size of its own edit.
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
        groups = torch.arange(len(new.subjects)) if new.shares is None else new.shares.argmax(1)
        # A later request about a subject takes precedence, or its key would have no room left.
        before = Past(context.state, new.site, new.subjects).take(new.keys, groups)
        free = outside(before, new.keys, config.occupied * new.size)
        return kv_solve(free, new.residuals, ridge, shares=new.shares)


def outside(taken: Iterable[Tensor], keys: Tensor, threshold: float) -> Tensor:
    """Keys without the directions that earlier ones took, edit by edit (EvoEdit, arXiv 2510.13851).

    With ``P_0`` the identity and ``Q_s`` the left singular vectors of ``P_{s-1} K_s`` whose squared singular values
    exceed the threshold, ``P_s = P_{s-1} - Q_s Q_sᵀ``; the keys that come back are ``P_t keys``. ``P_s`` is kept as
    ``I - Q Qᵀ``, which costs as much as there are directions.

    Args:
        taken: ``[d_in, n_s]``, the keys of each edit before, in their order.
        keys: ``[d_in, c]``.
        threshold: what an edit's squared components along a direction add up to at least, if it takes it.

    Returns:
        ``[d_in, c]`` float32.
    """
    basis = torch.zeros(len(keys), 0, dtype=torch.float64)

    def left(columns: Tensor) -> Tensor:
        return columns.double() - basis @ (basis.t() @ columns.double())

    for part in taken:
        rest = left(part)
        values, vectors = torch.linalg.eigh(rest.t() @ rest)
        strong = values > threshold
        basis = torch.cat([basis, rest @ (vectors[:, strong] * values[strong].rsqrt())], 1)
    return left(keys).float()
