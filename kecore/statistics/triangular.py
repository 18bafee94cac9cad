"""Symmetric matrices kept as one triangle, and their factors, without copies: a key width of 14,336 is 1.6 GB each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["action_change", "cholesky_", "invert_", "pack_triangle", "symmetrise_", "triangle_width", "unpack_triangle"]

_PANEL = 512  # rows that are worked on at once


def pack_triangle(matrix: Tensor) -> Tensor:
    """Return the lower triangle of ``[d, d]``, row after row: ``[d (d + 1) / 2]``."""
    triangle = matrix.new_empty(len(matrix) * (len(matrix) + 1) // 2)
    begin = 0
    for length, row in enumerate(matrix, start=1):
        triangle[begin : begin + length] = row[:length]
        begin += length
    return triangle


def unpack_triangle(triangle: Tensor) -> Tensor:
    """Return the symmetric matrix ``[d, d]`` that :func:`pack_triangle` made this triangle of."""
    d = triangle_width(triangle)
    matrix = triangle.new_empty(d, d)
    begin = 0
    for length, row in enumerate(matrix, start=1):
        row[:length] = triangle[begin : begin + length]
        begin += length
    return symmetrise_(matrix)


def triangle_width(triangle: Tensor) -> int:
    """Return how many columns the matrix has that :func:`pack_triangle` made this triangle of."""
    # n = d (d + 1) / 2 solved for d
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
    """Factor a symmetric matrix ``A = L Lᵀ`` in place, and return ``L``; None where A is not positive definite."""
    # In LAPACK's layout, by columns, the factor can be written over the matrix; a symmetric one is its own transpose.
    columns = matrix.t()
    info = torch.empty(0, dtype=torch.int32, device=matrix.device)
    lower, info = torch.linalg.cholesky_ex(columns, out=(columns, info))
    return lower if int(info) == 0 else None


def invert_(lower: Tensor) -> Tensor:
    """Invert a lower triangular matrix in place, one panel of rows after the other from the top, and return it."""
    d = len(lower)
    for begin in range(0, d, _PANEL):
        end = min(begin + _PANEL, d)
        block = lower[begin:end, begin:end]
        eye = torch.eye(end - begin, dtype=lower.dtype, device=lower.device)
        block.copy_(torch.linalg.solve_triangular(block, eye, upper=False))
        # Of [[A, 0], [B, D]] the inverse is [[A⁻¹, 0], [-D⁻¹ B A⁻¹, D⁻¹]]; the rows above hold A⁻¹ already.
        left = lower[begin:end, :begin]
        left.copy_(block @ (left @ lower[:begin, :begin]).neg_())
    return lower


def action_change(half: Tensor, whole: Tensor) -> float:
    """Measure how much ``C⁻¹ k`` changes for random keys, from one second moment to a later one.

    Args:
        half: triangle of the earlier moment.
        whole: triangle of the later moment, from which the keys are drawn.

    Returns:
        ``‖C₁⁻¹ k - C₂⁻¹ k‖ / ‖C₂⁻¹ k‖`` over all keys; NaN where a moment is not finite.
    """
    later = unpack_triangle(whole)
    ridge = 1e-4 * float(later.diagonal().mean())
    noise = torch.randn(len(later), 16, dtype=later.dtype, generator=torch.Generator().manual_seed(0))
    lower = _factor(later, ridge)
    keys = lower @ noise  # [d, 16]: their second moment is C
    new = torch.cholesky_solve(keys, lower)
    del later, lower  # one matrix at a time
    old = torch.cholesky_solve(keys, _factor(unpack_triangle(half), ridge))
    return float((old - new).norm() / new.norm())


def _factor(matrix: Tensor, ridge: float) -> Tensor:
    """Factor ``matrix + ridge I`` in place; NaN throughout where that is not positive definite."""
    matrix.diagonal().add_(ridge)
    lower = cholesky_(matrix)
    if lower is None:  # the keys overflowed; `collect_statistics` refuses them with the layer's number
        return torch.full_like(matrix, float("nan"))
    return lower
