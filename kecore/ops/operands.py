"""Checks of the ops' operands: each refusal says what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kecore.api.errors import OperandError

__all__ = ["check_choice", "check_moments", "check_systems"]

_KEYS = (torch.float32, torch.float16, torch.bfloat16)
_MOMENTS = (torch.float64, torch.float32)


def check_moments(moments: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
    """Refuse moments and keys that do not fit.

    Raises:
        OperandError: says which, what was expected and what came.
    """
    if len(moments) != len(keys):
        raise OperandError(f"expected as many moments as keys, got {len(moments)} and {len(keys)}")
    for moment, key in zip(moments, keys, strict=True):
        if key.ndim != 2 or moment.shape != (key.shape[1], key.shape[1]):
            raise OperandError(
                f"expected moment [d, d] and keys [tokens, d], got {tuple(moment.shape)} and {tuple(key.shape)}"
            )
        if key.dtype not in _KEYS or moment.dtype not in _MOMENTS:
            raise OperandError(
                "expected keys of float32, float16 or bfloat16 and a moment of float64 or float32, "
                f"got {key.dtype} and {moment.dtype}"
            )
        if key.dtype != keys[0].dtype or moment.dtype != moments[0].dtype:
            raise OperandError("expected all layers of one call to have keys of one type and moments of one type")
        if not key.device == moment.device == keys[0].device:
            raise OperandError(f"expected one device, got keys on {key.device} and a moment on {moment.device}")
        d = len(moment)
        if d > 1 and (moment.stride(1) != 1 or moment.stride(0) < d):
            raise OperandError(f"expected a moment whose rows are contiguous, got strides {moment.stride()}")
    _check_apart(moments, keys)


def _check_apart(moments: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
    """Refuse moments that share memory with each other or with keys: they are written while the others are read."""
    stretches: list[_Stretch] = []
    for tensors, written in ((moments, True), (keys, False)):
        for tensor in tensors:
            if tensor.numel():
                stretches.append(_stretch(tensor, written=written))
    # By where they begin, each is compared with those before it by how far these reach: experts come in hundreds.
    end_of_written = end_of_any = 0
    for stretch in sorted(stretches, key=lambda stretch: stretch.begin):
        reached = end_of_any if stretch.written else end_of_written
        if stretch.begin < reached:
            raise OperandError("expected moments that share no memory with each other or with the keys")
        end_of_any = max(end_of_any, stretch.end)
        if stretch.written:
            end_of_written = max(end_of_written, stretch.end)


@dataclass(frozen=True, slots=True)
class _Stretch:
    """The memory from a tensor's first to behind its last element.

    Args:
        begin: first address.
        end: address behind the last.
        written: a moment's, not keys'.
    """

    begin: int
    end: int
    written: bool


def _stretch(tensor: Tensor, *, written: bool) -> _Stretch:
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return _Stretch(begin, begin + (last + 1) * tensor.element_size(), written)


def check_choice(keys: Sequence[Tensor], rows: Tensor | None, mask: Tensor | None) -> None:
    """Refuse row lists and masks that do not fit the keys.

    Raises:
        OperandError: says what was expected and what came.
    """
    if rows is not None and mask is not None:
        raise OperandError("expected rows or a mask, got both")
    for key in keys:
        if mask is not None and (mask.dtype != torch.bool or mask.shape != key.shape[:1]):
            raise OperandError(
                f"expected a mask [tokens] of bool for {key.shape[0]} tokens, got {tuple(mask.shape)} of {mask.dtype}"
            )
        if rows is not None:
            if rows.dtype != torch.int64 or rows.ndim != 1:
                raise OperandError(f"expected rows [n] of int64, got {tuple(rows.shape)} of {rows.dtype}")
            # Not on CUDA, where asking would wait for the device.
            if rows.device.type == "cpu" and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(key):
                raise OperandError(
                    f"expected rows from 0 to {len(key) - 1}, got {int(rows.min())} to {int(rows.max())}"
                )
    choice = mask if rows is None else rows
    if choice is not None and keys and choice.device != keys[0].device:
        raise OperandError(f"expected rows or mask on the keys' {keys[0].device}, got {choice.device}")


def check_systems(
    keys: Tensor, residuals: Tensor, ridge: Tensor, inverse_factor: Tensor | None, shares: Tensor | None
) -> None:
    """Refuse the operands of a batch of key-value solves that do not fit.

    Raises:
        OperandError: says what was expected and what came.
    """
    shapes = f"got keys {tuple(keys.shape)} and residuals {tuple(residuals.shape)}"
    if keys.ndim != 3 or residuals.ndim != 3 or len(keys) != len(residuals):
        raise OperandError(f"expected keys [batch, d_in, n] and residuals [batch, d_out, u], {shapes}")
    batch, d, n = keys.shape
    u = residuals.shape[2]
    if not (d and n and u):
        raise OperandError(f"expected at least one key and one residual, {shapes}")
    if ridge.shape != (batch,):
        raise OperandError(f"expected one ridge a system, got {tuple(ridge.shape)} for {batch} systems")
    if inverse_factor is not None:
        fits = inverse_factor.shape in ((d, d), (batch, d, d))
        if not fits or inverse_factor.dtype != torch.float32:
            raise OperandError(
                f"expected an inverse factor [{d}, {d}] of float32, or one a system, "
                f"got {tuple(inverse_factor.shape)} of {inverse_factor.dtype}"
            )
    if shares is None:
        fits = u <= n
    else:
        fits = shares.ndim == 3 and len(shares) == batch and shares.shape[2] == u and 0 < shares.shape[1] <= n
    if not fits:
        given = "no shares" if shares is None else f"shares {tuple(shares.shape)}"
        raise OperandError(f"expected shares [batch, c <= n, u], or at most a residual a key, {shapes} and {given}")
    for name, tensor in (("residuals", residuals), ("inverse_factor", inverse_factor), ("shares", shares)):
        if tensor is not None and tensor.device != keys.device:
            raise OperandError(f"expected {name} on the keys' {keys.device}, got {tensor.device}")
    for tensor in (keys, residuals):
        if not tensor.is_floating_point():
            raise OperandError(f"expected keys and residuals of a floating type, got {tensor.dtype}")
