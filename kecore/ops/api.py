"""The two computations that kecore's speed rests on, for callers: checked, and run by the fastest code there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from kecore.api.errors import NonFiniteError, NumericalError
from kecore.ops import loader
from kecore.ops.operands import check_choice, check_moments, check_systems

__all__ = ["Solution", "Solutions", "kv_solve", "kv_solve_batch", "second_moment_"]

_SINGULAR = 1e14  # condition beyond which a float64 solution means nothing


class Solution(NamedTuple):
    """A low-rank update ``U Vᵀ`` of a weight ``[d_out, d_in]``, and how good it is.

    Args:
        U: ``[d_out, n]`` float32.
        V: ``[d_in, n]`` float32.
        edit_residual: ``‖U Vᵀ K - R‖ / ‖R‖`` over the new keys: 0 writes every value exactly, 1 nothing.
        condition: estimated condition number of the system that was solved; never above the true one.
    """

    U: Tensor
    V: Tensor
    edit_residual: float
    condition: float


class Solutions(NamedTuple):
    """The updates of many systems of one shape.

    Args:
        U: ``[batch, d_out, n]`` float32.
        V: ``[batch, d_in, n]`` float32.
        edit_residual: ``[batch]`` float64.
        condition: ``[batch]`` float64.
    """

    U: Tensor
    V: Tensor
    edit_residual: Tensor
    condition: Tensor


Moments = TypeVar("Moments", Tensor, Sequence[Tensor])


@torch.no_grad()
def second_moment_(
    moment: Moments,
    keys: Tensor | Sequence[Tensor],
    *,
    rows: Tensor | None = None,
    mask: Tensor | None = None,
) -> Moments:
    """Add ``keysᵀ keys`` to a symmetric moment in place, or to the moments of several layers in one call.

    Args:
        moment: ``[d, d]`` float64 or float32, rows contiguous; or one for each layer. Only what is on or below the
            diagonal is read and written; symmetrise with ``moment.tril() + moment.tril(-1).T`` when all is added.
        keys: ``[tokens, d]`` float32, float16 or bfloat16; or one for each layer, all of one type. The strides are
            free. A NaN or infinity goes into its column's sums.
        rows: ``[n]`` int64, which tokens to add, for every layer; a token that is named twice counts twice.
        mask: ``[tokens]`` bool, which tokens to add. Not together with ``rows``. What other tokens hold, even NaN,
            does not matter.

    Products of bfloat16 and float16 keys are exact, those of float32 keys are rounded to float32, never to less.
    On a CPU sums over at most a few thousand tokens are float32, on a GPU two-level sums over at most 32,768; beyond
    that they have the moment's type. The relative error in the Frobenius norm is below 3e-6. AVX512-BF16 and AMX take
    subnormal keys (below 1.2e-38) for zero. The result does not depend on the number of threads.

    Returns:
        ``moment``.

    Raises:
        OperandError: shapes, types, devices or strides do not fit, or tensors share memory.
        NativeError: ``KECORE_NATIVE`` asks for native code that cannot be had.
    """
    moments = [moment] if isinstance(moment, Tensor) else list(moment)
    layer_keys = [keys] if isinstance(keys, Tensor) else list(keys)
    check_moments(moments, layer_keys)
    check_choice(layer_keys, rows, mask)
    if not moments:
        return moment
    layer_keys = [_with_contiguous_rows(x) for x in layer_keys]
    if rows is not None:
        rows = rows.contiguous()
    if mask is not None:
        mask = mask.contiguous()
    loader.implementation(moments[0].device).second_moment_(moments, layer_keys, rows, mask)
    return moment


def _with_contiguous_rows(matrix: Tensor) -> Tensor:
    """Return the matrix, copied only where a row's elements do not stand one after another, or rows overlap."""
    rows, columns = matrix.shape
    in_a_row = columns < 2 or matrix.stride(1) == 1
    apart = rows < 2 or matrix.stride(0) >= columns  # not so of an expanded row
    return matrix if in_a_row and apart else matrix.contiguous()


def kv_solve(
    keys: Tensor,
    residuals: Tensor,
    ridge: float,
    inverse_factor: Tensor | None = None,
    shares: Tensor | None = None,
) -> Solution:
    """Find the smallest update that maps new keys to residuals and preserved keys to zero.

    With ``W = C⁻¹K``, ``G = KᵀW`` the update is ``Δ = R (αI + G)⁻¹ Wᵀ`` (push-through form of MEMIT eq. 14,
    arXiv 2210.07229), an ``n x n`` system instead of ``d x d``; with more keys than columns the equal ``d x d`` one
    is solved. One formula serves the family:

    * MEMIT: ``ridge`` is the preservation weight λ. EMMET: its ``emmet_lambda``. ROME: ``n = 1``,
      ``ridge = 0``, which writes the value exactly.
    * AlphaEdit: no factor (``C = I``), keys projected on the null space, earlier keys before the new ones.

    Args:
        keys: ``[d_in, n_old + c]``, taken as float32. The last ``c`` columns are to be mapped to residuals, the
            ones before them to zero.
        residuals: ``[d_out, n]``.
        ridge: α, not negative.
        inverse_factor: ``[d_in, d_in]`` float32, ``L⁻¹`` of ``C = L Lᵀ``: lower triangular; None for ``C = I``.
        shares: ``[c, n]``: new key ``j`` is to be mapped to ``residuals @ shares[j]``. None for one key a
            residual (``c = n``).

    Returns:
        Factors of the update. Gram matrix, factor and solution of the small system are float64; products with
        ``L⁻¹`` are float32. At condition 1e8 of C the update is within 1e-3 of the exact one.

    Raises:
        OperandError: shapes, types or devices do not fit.
        NonFiniteError: keys or residuals hold NaN or infinity.
        NumericalError: the system is not positive definite; names a ridge that would make it so.
        NativeError: ``KECORE_NATIVE`` asks for native code that cannot be had.
    """
    ridges = torch.tensor([float(ridge)], dtype=torch.float64, device=keys.device)
    if shares is not None:
        shares = shares[None]
    # A batch of one system.
    solutions = kv_solve_batch(keys[None], residuals[None], ridges, inverse_factor, shares)
    return Solution(solutions.U[0], solutions.V[0], float(solutions.edit_residual), float(solutions.condition))


@torch.no_grad()
def kv_solve_batch(
    keys: Tensor,
    residuals: Tensor,
    ridge: Tensor,
    inverse_factor: Tensor | None = None,
    shares: Tensor | None = None,
) -> Solutions:
    """Run :func:`kv_solve` for many systems of one shape: layers, or edits that are judged one by one.

    Args:
        keys: ``[batch, d_in, n_old + c]``.
        residuals: ``[batch, d_out, n]``.
        ridge: ``[batch]``.
        inverse_factor: ``[d_in, d_in]``, which all systems share in one product, or ``[batch, d_in, d_in]``.
        shares: ``[batch, c, n]``.

    Raises:
        OperandError: shapes, types or devices do not fit.
        NonFiniteError: keys or residuals hold NaN or infinity.
        NumericalError: a system is not positive definite; says which, and names a ridge that would make it so.
        NativeError: ``KECORE_NATIVE`` asks for native code that cannot be had.
    """
    check_systems(keys, residuals, ridge, inverse_factor, shares)
    keys = keys.to(torch.float32).contiguous()
    residuals = residuals.to(torch.float32)  # the left factor U as it stands: the update is R Vᵀ
    ridge = ridge.to(keys.device, torch.float64).contiguous()
    if shares is not None:
        shares = shares.to(torch.float64).contiguous()
    if inverse_factor is not None and inverse_factor.stride(-1) != 1:
        inverse_factor = inverse_factor.contiguous()
    solve = loader.implementation(keys.device).kv_solve
    right, edit_residual, condition = solve(keys, residuals, ridge, inverse_factor, shares)
    finite = torch.isfinite(keys).all() & torch.isfinite(residuals).all()
    well_conditioned = (condition <= _SINGULAR).all()
    is_finite, is_solved = torch.stack([finite, well_conditioned]).tolist()  # one wait for the device
    if not is_finite:
        raise NonFiniteError("keys and residuals must be finite; the model or the target values overflowed")
    if not is_solved:
        raise NumericalError(_explain_singular(keys, ridge, condition, inverse_factor))
    return Solutions(residuals, right, edit_residual, condition)


def _explain_singular(keys: Tensor, ridge: Tensor, condition: Tensor, factor: Tensor | None) -> str:
    """Say what is wrong with the worst conditioned system and what to do about it."""
    worst = int(condition.argmax())
    white = keys[worst].double()  # [d_in, n]
    if factor is not None:
        worst_factor = factor if factor.ndim == 2 else factor[worst]
        white = worst_factor.double() @ white
    size = white.square().sum()  # trace of the Gram matrix
    n = keys.shape[2]
    system = f" of system {worst}" if len(keys) > 1 else ""
    return (
        f"the {n} keys{system} are linearly dependent (condition {float(condition[worst]):.1e}), so their values "
        f"cannot all be written with ridge {float(ridge[worst]):g}; merge requests with the same subject, or use a "
        f"ridge of at least {1e-8 * float(size) / n:.1e}"
    )
