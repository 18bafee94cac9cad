"""The ops in torch. They run where no native kernel does, and native kernels are compared with them."""

from __future__ import annotations

import sys
import threading
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


_precision_lock = threading.RLock()
"""The setting is the whole process's: of two threads, the second would put back the first one's."""


@contextmanager
def _single_precision(device: torch.device) -> Iterator[None]:
    """Keep products of float32 in float32, whatever the caller allows elsewhere (TF32, bfloat16, autocast)."""
    backends: Any = torch.backends
    backend = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    with _precision_lock:
        precision = backend.fp32_precision
        backend.fp32_precision = "ieee"
        try:
            with torch.autocast(device.type, enabled=False):
                yield
        finally:
            backend.fp32_precision = precision


def second_moment_(
    moments: Sequence[Tensor], keys: Sequence[Tensor], rows: Tensor | None = None, mask: Tensor | None = None
) -> None:
    """``moments[i] += keys[i][chosen]ᵀ keys[i][chosen]`` on and below the diagonal."""
    chosen = mask if rows is None else rows
    for moment, layer_keys in zip(moments, keys, strict=True):
        if chosen is not None:
            layer_keys = layer_keys[chosen]  # [n, d]
        with _single_precision(moment.device):
            for chunk in layer_keys.split(_TOKENS):  # [at most _TOKENS, d]
                _add_panels(moment, chunk)


def _add_panels(moment: Tensor, keys: Tensor) -> None:
    """Add ``keysᵀ keys`` to the lower triangle ``[d, d]``, panel of columns by panel; keys are ``[n, d]``."""
    # CUDA multiplies 16-bit keys as they are and sums in float32; elsewhere the result would be rounded to 16 bits.
    tensor_cores = keys.is_cuda and keys.dtype != torch.float32
    if not tensor_cores:
        keys = keys.float()
    d = len(moment)
    for begin in range(0, d, _PANEL):
        end = min(begin + _PANEL, d)
        left, right = keys[:, begin:].t(), keys[:, begin:end]
        # [d - begin, panel]
        product = torch.mm(left, right, out_dtype=torch.float32) if tensor_cores else left @ right
        panel = moment[begin:, begin:end]  # [d - begin, panel]: the square on the diagonal, then what is below it
        panel[end - begin :] += product[end - begin :]
        panel[: end - begin] += product[: end - begin].tril()


def factor_product(factor: Tensor, x: Tensor, transposed: bool) -> Tensor:
    """``L⁻¹ x`` or ``L⁻ᵀ x``: factor ``[d, d]`` lower triangular, zero above; x ``[batch, d, n]``; both float32."""
    with _single_precision(x.device):
        batch, d, n = x.shape
        columns = x.permute(1, 0, 2).reshape(d, batch * n)  # all systems share the factor: one product for all
        product = (factor.t() if transposed else factor) @ columns
        return product.reshape(d, batch, n).permute(1, 0, 2).contiguous()


def gram_solve(white: Tensor, ridge: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return Gram matrices ``G``, weights ``(G + ridge I)⁻¹ P`` and extreme pivots of each system's Cholesky factor.

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
    """Return ``P [batch, n, u]``: zero for the earlier keys, then the shares of the new ones."""
    batch, n, _ = gram.shape
    if shares is None:
        return torch.eye(n, dtype=gram.dtype, device=gram.device).expand(batch, n, n)
    earlier = shares.new_zeros(batch, n - shares.shape[1], shares.shape[2])
    return torch.cat([earlier, shares], dim=1)


def _spd_solve(matrix: Tensor, ridge: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(matrix + ridge I)⁻¹ right`` and the extreme pivots ``[batch, 2]`` of its Cholesky factor."""
    system = matrix.clone()
    system.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    factor, info = torch.linalg.cholesky_ex(system)
    diagonal = factor.diagonal(dim1=1, dim2=2)
    smallest = torch.where(info == 0, diagonal.amin(1), 0.0)  # info tells where it is not positive definite
    pivots = torch.stack([diagonal.amax(1), smallest], dim=1)
    return torch.cholesky_solve(right, factor).contiguous(), pivots


def kv_solve(
    keys: Tensor,
    residuals: Tensor,
    ridge: Tensor,
    inverse_factor: Tensor | None = None,
    shares: Tensor | None = None,
    kernels: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the right factor of each system's update, its edit residual and its condition.

    Args:
        keys: ``[batch, d, n]`` float32.
        residuals: ``[batch, d_out, u]`` float32.
        ridge: ``[batch]`` float64.
        inverse_factor: ``[d, d]``, or ``[batch, d, d]`` for one a system; float32.
        shares: ``[batch, c, u]`` float64; None for the identity (``c = u``).
        kernels: namespace that offers ``factor_product`` and ``gram_solve``; this module by default.

    Returns:
        ``V [batch, d, u]`` float32; ``[batch]`` float64 twice. The condition is infinite where a system is not
        positive definite; V is undefined there.
    """
    this_module = sys.modules[__name__]
    kernels = kernels or this_module
    batch, d, n = keys.shape
    u = residuals.shape[2]
    if shares is None and u < n:  # the last keys get their own residual, those before them zero
        shares = torch.eye(u, dtype=torch.float64, device=keys.device).expand(batch, u, u).contiguous()
    new = n if shares is None else shares.shape[1]  # how many of the keys, the last ones, are to be written
    multiplier = kernels if batch * n >= _FEW else this_module
    white = keys  # L⁻¹ K [batch, d, n]
    if inverse_factor is not None:
        white = _whiten(multiplier, inverse_factor, keys, transposed=False)
    if n > d:
        white_v, pivots = _solve_primal(white, ridge, shares)
        v = white_v
        if inverse_factor is not None:
            v = _whiten(multiplier, inverse_factor, white_v, transposed=True)
    else:
        solver = kernels if n <= _COLUMNS.get(keys.device.type, 0) else this_module
        _, weights, pivots = solver.gram_solve(white, ridge, shares)
        back = white  # C⁻¹ K
        if inverse_factor is not None:
            back = _whiten(multiplier, inverse_factor, white, transposed=True)
        v = (back.double() @ weights).float()  # [batch, d, u]
    edit_residual = _measure_miss(residuals, v, keys[:, :, n - new :], shares)
    condition = (pivots[:, 0] / pivots[:, 1]).square().nan_to_num(nan=float("inf"))
    return v, edit_residual, condition


def _measure_miss(residuals: Tensor, v: Tensor, new_keys: Tensor, shares: Tensor | None) -> Tensor:
    """Return ``‖R Vᵀ K - R Sᵀ‖ / ‖R Sᵀ‖`` of each system, ``[batch]`` float64, of the factors as they are returned.

    Args:
        residuals: ``R [batch, d_out, u]``.
        v: ``[batch, d, u]`` float32.
        new_keys: ``[batch, d, c]``.
        shares: ``S [batch, c, u]``; None for the identity (``c = u``).
    """
    r, right = residuals.double(), v.double()
    missed, wanted = r.new_zeros(len(r)), r.new_zeros(len(r))
    for begin in range(0, new_keys.shape[2], _PANEL):
        columns = slice(begin, begin + _PANEL)
        # From the left, as [u, c] of all columns at once would be the largest tensor of all.
        given = r @ (right.mT @ new_keys[:, :, columns].double())  # [batch, d_out, panel]
        target = r[:, :, columns] if shares is None else r @ shares[:, columns].mT  # [batch, d_out, panel]
        missed += (given - target).square().sum(dim=(1, 2))
        wanted += target.square().sum(dim=(1, 2))
    return missed.sqrt() / wanted.sqrt().clamp(min=1e-300)


def _solve_primal(white: Tensor, ridge: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor]:
    """Solve the ``d x d`` system ``(ridge I + Y Yᵀ)⁻¹ Y P``, equal by push-through; for more keys than columns.

    Args:
        white: ``Y [batch, d, n]``.
        ridge: ``[batch]`` float64.
        shares: ``[batch, c, u]`` float64, the last rows of ``P``; None for the identity.

    Returns:
        Right factors in white coordinates ``[batch, d, u]`` float32, and pivots ``[batch, 2]``.
    """
    y = white.double()
    new_keys = y if shares is None else y[:, :, -shares.shape[1] :]  # [batch, d, c]
    right = new_keys if shares is None else new_keys @ shares  # [batch, d, u]
    v, pivots = _spd_solve(y @ y.mT, ridge, right)
    return v.float(), pivots


def _whiten(kernels: Any, factor: Tensor, x: Tensor, transposed: bool) -> Tensor:
    """Multiply ``x [batch, d, n]`` by ``L⁻¹``, or ``L⁻ᵀ``: one factor for all systems, or one a system."""
    if factor.ndim == 2:
        return kernels.factor_product(factor, x, transposed)
    products: list[Tensor] = []
    for system_factor, system in zip(factor, x.split(1), strict=True):
        products.append(kernels.factor_product(system_factor, system, transposed))
    return torch.cat(products)
