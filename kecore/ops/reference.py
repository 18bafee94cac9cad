"""The ops in torch: what runs where no native kernel does, and what native kernels are compared with."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["factor_product", "gram_solve", "kv_solve", "second_moment_"]

_PANEL = 512  # columns of one panel of the lower triangle; measured best on CPU at d = 1536
_TOKENS = 8192  # tokens that are summed in float32
_FEW = 4  # columns below which a general product of torch, bound by memory, beats the triangular one
# Columns of one system beyond which libraries are faster, or that a CUDA kernel does not take (KE_MAX_COLUMNS).
_COLUMNS = {"cpu": 128, "cuda": 64}


@contextmanager
def _single_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 stay in float32, whatever the caller allows elsewhere (TF32, bfloat16, autocast)."""
    backends: Any = torch.backends
    backend = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        backend.fp32_precision = before


def second_moment_(
    moments: Sequence[Tensor], keys: Sequence[Tensor], rows: Tensor | None = None, mask: Tensor | None = None
) -> None:
    """``moments[i] += keys[i][chosen]ᵀ keys[i][chosen]`` on and below the diagonal."""
    chosen = mask if rows is None else rows
    for moment, all_keys in zip(moments, keys, strict=True):
        with _single_precision(moment.device):
            x = all_keys if chosen is None else all_keys[chosen]
            for part in x.split(_TOKENS):
                _add_panels(moment, part)


def _add_panels(moment: Tensor, x: Tensor) -> None:
    # CUDA multiplies 16-bit keys as they are and sums in float32; elsewhere the result would be rounded to 16 bits.
    tensor_cores = x.is_cuda and x.dtype != torch.float32
    x = x if tensor_cores else x.float()
    d = len(moment)
    for begin in range(0, d, _PANEL):
        end = min(begin + _PANEL, d)
        left, right = x[:, begin:].t(), x[:, begin:end]
        product = torch.mm(left, right, out_dtype=torch.float32) if tensor_cores else left @ right
        below = moment[begin:, begin:end]
        below[end - begin :] += product[end - begin :]
        below[: end - begin] += product[: end - begin].tril()


def factor_product(factor: Tensor, x: Tensor, transposed: bool) -> Tensor:
    """``L⁻¹ x`` or ``L⁻ᵀ x``: factor ``[d, d]`` lower triangular, zero above; x ``[batch, d, n]``; both float32."""
    with _single_precision(x.device):
        batch, d, n = x.shape
        columns = x.permute(1, 0, 2).reshape(d, batch * n)
        product = (factor.t() if transposed else factor) @ columns
        return product.reshape(d, batch, n).permute(1, 0, 2).contiguous()


def gram_solve(white: Tensor, ridge: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrices ``G``, weights ``(G + ridge I)⁻¹ P`` and the extreme pivots of each system's Cholesky factor.

    Args:
        white: ``[batch, d, n]`` float32.
        ridge: ``[batch]`` float64.
        shares: ``[batch, c, u]`` float64, the last rows of ``P [n, u]``; None for the identity.

    Returns:
        ``[batch, n, n]``, ``[batch, n, u]``, ``[batch, 2]`` (largest and smallest; the smallest is 0 where the
        system is not positive definite), all float64.
    """
    y = white.double()
    gram = y.mT @ y
    weights, pivots = _spd_solve(gram, ridge, _targets(gram, shares))
    return gram, weights, pivots


def _targets(gram: Tensor, shares: Tensor | None) -> Tensor:
    batch, n, _ = gram.shape
    if shares is None:
        return torch.eye(n, dtype=gram.dtype, device=gram.device).expand(batch, n, n)
    return torch.cat([shares.new_zeros(batch, n - shares.shape[1], shares.shape[2]), shares], dim=1)


def _spd_solve(matrix: Tensor, ridge: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """``(matrix + ridge I)⁻¹ right`` and the pivots of its factor, by Cholesky."""
    system = matrix.clone()
    system.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    factor, info = torch.linalg.cholesky_ex(system)
    diagonal = factor.diagonal(dim1=1, dim2=2)
    smallest = torch.where(info == 0, diagonal.amin(1), 0.0)
    return torch.cholesky_solve(right, factor).contiguous(), torch.stack([diagonal.amax(1), smallest], dim=1)


def kv_solve(
    keys: Tensor,
    residuals: Tensor,
    ridge: Tensor,
    inverse_factor: Tensor | None = None,
    shares: Tensor | None = None,
    parts: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The right factor of each system's update, its edit residual and its condition.

    Args:
        keys: ``[batch, d, n]`` float32.
        residuals: ``[batch, d_out, u]`` float32.
        ridge: ``[batch]`` float64.
        inverse_factor: ``[d, d]``, or ``[batch, d, d]`` for one a system; float32.
        shares: ``[batch, c, u]`` float64; None for the identity (``c = u``).
        parts: what offers ``factor_product`` and ``gram_solve``; this module by default.

    Returns:
        ``V [batch, d, u]`` float32; ``[batch]`` float64 twice. The condition is infinite where a system is not
        positive definite; V is undefined there.
    """
    this = sys.modules[__name__]
    parts = parts or this
    batch, d, n = keys.shape
    u = residuals.shape[2]
    if shares is None and u < n:  # the last keys get their own residual, those before them zero
        shares = torch.eye(u, dtype=torch.float64, device=keys.device).expand(batch, u, u).contiguous()
    product = parts if batch * n >= _FEW else this
    white = keys if inverse_factor is None else _whiten(product, inverse_factor, keys, False)
    r = residuals.double()
    # What the update gives on the new keys is multiplied from the left: [u, c] would be the largest tensor of all.
    if n > d:
        v, given, pivots = _primal(white, ridge, shares, r)
    else:
        solver = parts if n <= _COLUMNS.get(keys.device.type, 0) else this
        gram, weights, pivots = solver.gram_solve(white, ridge, shares)
        back = white if inverse_factor is None else _whiten(product, inverse_factor, white, True)
        v = (back.double() @ weights).float()
        given = (r @ weights.mT) @ gram[:, :, n - (n if shares is None else shares.shape[1]) :]
    if n > d and inverse_factor is not None:
        v = _whiten(product, inverse_factor, v, True)
    wanted = r if shares is None else r @ shares.mT
    residual = (given - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1).clamp(min=1e-300)
    return v, residual, (pivots[:, 0] / pivots[:, 1]).square().nan_to_num(nan=float("inf"))


def _primal(white: Tensor, ridge: Tensor, shares: Tensor | None, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """More keys than columns: a ``d x d`` system, ``(ridge I + Y Yᵀ)⁻¹ Y P``, equal by push-through.

    Returns:
        Right factors in white coordinates ``[batch, d, u]``, what the update gives on the new keys
        ``[batch, d_out, c]``, pivots.
    """
    y = white.double()
    new = y if shares is None else y[:, :, -shares.shape[1] :]
    v, pivots = _spd_solve(y @ y.mT, ridge, new if shares is None else new @ shares)
    return v.float(), (r @ v.mT) @ new, pivots


def _whiten(parts: Any, factor: Tensor, x: Tensor, transposed: bool) -> Tensor:
    if factor.ndim == 2:
        return parts.factor_product(factor, x, transposed)
    each = zip(factor, x.split(1), strict=True)
    return torch.cat([parts.factor_product(one, columns, transposed) for one, columns in each])
