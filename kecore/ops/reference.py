"""Torch implementations of the ops: what runs where no native kernel does, and the tests' oracle in fp64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kecore.errors import NonFiniteError, NumericalError

__all__ = ["Solution", "kv_solve", "second_moment_"]

_PANEL = 512  # columns of one panel of the lower triangle; measured best on CPU at d = 1536


class Solution(NamedTuple):
    """A low-rank update ``U Vᵀ`` of a weight ``[d_out, d_in]``, and how good it is.

    Args:
        U: ``[d_out, n]`` float32.
        V: ``[d_in, n]`` float32.
        edit_residual: ``‖U Vᵀ K - R‖ / ‖R‖`` over the new keys: 0 writes every value exactly, 1 nothing.
        condition: estimated condition number of the ``n x n`` system.
    """

    U: Tensor
    V: Tensor
    edit_residual: float
    condition: float


@torch.no_grad()
def second_moment_(moment: Tensor, keys: Tensor) -> Tensor:
    """Add ``keysᵀ keys`` to a symmetric moment, in place.

    Args:
        moment: ``[d, d]`` float64 or float32. Only the lower triangle is right afterwards (what is above it is
            undefined); symmetrise with ``moment.tril() + moment.tril(-1).T`` when all is added.
        keys: ``[tokens, d]``, any floating type. Products are formed in float32, so bfloat16 and float16
            keys lose nothing; sums within one call are float32, across calls in the moment's type.

    Returns:
        ``moment``.

    Raises:
        ValueError: shapes or types do not fit.
    """
    d = moment.shape[0]
    if moment.shape != (d, d) or keys.ndim != 2 or keys.shape[1] != d:
        raise ValueError(
            f"expected moment [d, d] and keys [tokens, d], got {tuple(moment.shape)} and {tuple(keys.shape)}"
        )
    x = keys.to(moment.device, torch.float32)
    for begin in range(0, d, _PANEL):
        end = min(begin + _PANEL, d)
        moment[begin:, begin:end] += x[:, begin:].t() @ x[:, begin:end]
    return moment


@torch.no_grad()
def kv_solve(
    keys: Tensor,
    residuals: Tensor,
    ridge: float,
    inverse_factor: Tensor | None = None,
    shares: Tensor | None = None,
) -> Solution:
    """Smallest update that maps new keys to residuals and preserved keys to zero, in dual form.

    With ``W = C⁻¹K``, ``G = KᵀW`` the update is ``Δ = R (αI + G)⁻¹ Wᵀ`` (push-through form of MEMIT eq. 14,
    arXiv 2210.07229), an ``n x n`` system instead of ``d x d``. One formula serves the family:

    * MEMIT: ``ridge`` is the preservation weight λ. EMMET: its ``emmet_lambda``. ROME: ``n = 1``,
      ``ridge = 0``, which writes the value exactly.
    * AlphaEdit: no factor (``C = I``), keys projected on the null space, earlier keys before the new ones.

    Args:
        keys: ``[d_in, n_old + c]``. The last ``c`` columns are to be mapped to residuals, the ones before them
            to zero.
        residuals: ``[d_out, n]``.
        ridge: α, not negative.
        inverse_factor: ``[d_in, d_in]``, ``L⁻¹`` of ``C = L Lᵀ``; None for ``C = I``.
        shares: ``[c, n]``: new key ``j`` is to be mapped to ``residuals @ shares[j]``. None for one key a
            residual (``c = n``).

    Returns:
        Factors of the update. The ``n x n`` system is solved in float64.

    Raises:
        NonFiniteError: keys or residuals hold NaN or infinity.
        NumericalError: the system is not positive definite; names a ridge that would make it so.
    """
    if not bool(torch.isfinite(keys).all()) or not bool(torch.isfinite(residuals).all()):
        raise NonFiniteError("keys and residuals must be finite; the model or the target values overflowed")
    eye = torch.eye(residuals.shape[1], dtype=torch.float64, device=keys.device)
    shares = eye if shares is None else shares.to(keys.device, torch.float64)
    new = len(shares)
    white = keys if inverse_factor is None else inverse_factor @ keys.to(inverse_factor.dtype)
    gram = white.double().t() @ white.double()
    system = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(system)
    pivots = factor.diagonal()
    smallest = float(pivots.min()) if int(info) == 0 else 0.0
    condition = float(pivots.max()) ** 2 / smallest**2 if smallest > 0 else float("inf")
    if condition > 1e14:
        raise NumericalError(
            f"the {len(gram)} keys are linearly dependent (condition {condition:.1e}), so their values cannot all "
            f"be written with ridge {ridge:g}; merge requests with the same subject, or use a ridge of at least "
            f"{1e-8 * float(gram.diagonal().mean()):.1e}"
        )
    pick = torch.zeros(len(gram), shares.shape[1], dtype=gram.dtype, device=gram.device)
    pick[-new:] = shares
    weights = torch.cholesky_solve(pick, factor)
    back = white if inverse_factor is None else inverse_factor.t() @ white
    v = back.double() @ weights
    target = residuals.double() @ shares.t()
    written = residuals.double() @ (weights.t() @ gram[:, -new:])
    residual = float((written - target).norm() / target.norm().clamp(min=1e-300))
    return Solution(residuals.float(), v.float(), residual, condition)
