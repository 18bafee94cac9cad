"""Symmetric matrices kept as one triangle, and their factors, without copies: a key width of 14,336 is 1.6 GB each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["action_change", "cholesky_", "invert_", "pack_triangle", "symmetrise_", "triangle_width", "unpack_triangle"]

_PANEL = 512  # rows that are worked on at once


def pack_triangle(matrix: Tensor) -> Tensor:
    """The lower triangle of ``[d, d]``, row after row: ``[d (d + 1) / 2]``."""
    out = matrix.new_empty(len(matrix) * (len(matrix) + 1) // 2)
    begin = 0
    for i, row in enumerate(matrix):
        out[begin : begin + i + 1] = row[: i + 1]
        begin += i + 1
    return out


def unpack_triangle(triangle: Tensor) -> Tensor:
    """The symmetric matrix of a :func:`pack_triangle` triangle."""
    d = triangle_width(triangle)
    out = triangle.new_empty(d, d)
    begin = 0
    for i in range(d):
        out[i, : i + 1] = triangle[begin : begin + i + 1]
        begin += i + 1
    return symmetrise_(out)


def triangle_width(triangle: Tensor) -> int:
    """Columns of the matrix that was :func:`pack_triangle`."""
    return (math.isqrt(8 * triangle.numel() + 1) - 1) // 2


def symmetrise_(lower: Tensor) -> Tensor:
    """Copy what is below the diagonal to above it, in place."""
    d = len(lower)
    for begin in range(0, d, _PANEL):
        end = min(begin + _PANEL, d)
        lower[begin:end, end:] = lower[end:, begin:end].t()
        block = lower[begin:end, begin:end]
        block.copy_(block.tril() + block.tril(-1).t())
    return lower


def cholesky_(matrix: Tensor) -> Tensor | None:
    """``L`` of ``A = L Lᵀ``, in the place of the symmetric ``A``; None where A is not positive definite."""
    # In LAPACK's layout, by columns, the factor can be written over the matrix; a symmetric one is its own transpose.
    columns = matrix.t()
    info = torch.empty(0, dtype=torch.int32, device=matrix.device)
    lower, info = torch.linalg.cholesky_ex(columns, out=(columns, info))
    return lower if int(info) == 0 else None


def invert_(lower: Tensor) -> Tensor:
    """``L⁻¹`` in the place of the lower triangular ``L``: panel of rows by panel, from the top."""
    d = len(lower)
    for begin in range(0, d, _PANEL):
        end = min(begin + _PANEL, d)
        block = lower[begin:end, begin:end]
        eye = torch.eye(end - begin, dtype=lower.dtype, device=lower.device)
        block.copy_(torch.linalg.solve_triangular(block, eye, upper=False))
        left = lower[begin:end, :begin]
        left.copy_(block @ (left @ lower[:begin, :begin]).neg_())
    return lower


def action_change(half: Tensor, whole: Tensor) -> float:
    """Relative change of ``C⁻¹`` on random keys drawn from C, from one second moment to a later one.

    Args:
        half: the earlier one, :func:`pack_triangle`.
        whole: the later one, :func:`pack_triangle`.
    """
    later = unpack_triangle(whole)
    ridge = 1e-4 * float(later.diagonal().mean())
    noise = torch.randn(len(later), 16, dtype=later.dtype, generator=torch.Generator().manual_seed(0))
    lower = _factor(later, ridge)
    keys = lower @ noise
    new = torch.cholesky_solve(keys, lower)
    del later, lower  # one matrix at a time
    old = torch.cholesky_solve(keys, _factor(unpack_triangle(half), ridge))
    return float((old - new).norm() / new.norm())


def _factor(matrix: Tensor, ridge: float) -> Tensor:
    matrix.diagonal().add_(ridge)
    lower = cholesky_(matrix)
    if lower is None:  # keys that overflowed; whoever collects them says so
        return torch.full_like(matrix, float("nan"))
    return lower
