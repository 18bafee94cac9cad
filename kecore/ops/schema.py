"""Schemas and fake kernels of the ops in torch's dispatcher, over the torch implementations.

They exist without any compiled code; a native library adds kernels for CPU and CUDA, which then win. There is
no autograd: statistics and closed-form solves are never differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kecore.ops import reference

__all__ = ["OPS"]

OPS = ("second_moment_", "factor_product", "gram_solve", "kv_solve")
"""Names in the namespace ``torch.ops.kecore``."""

_check = torch._check  # pyright: ignore[reportPrivateUsage] - what torch's guide to custom ops tells to use
_library = torch.library.Library("kecore", "FRAGMENT")
_library.define("second_moment_(Tensor(a!)[] moments, Tensor[] keys, Tensor? rows=None, Tensor? mask=None) -> ()")
_library.define("factor_product(Tensor factor, Tensor x, bool transposed) -> Tensor")
_library.define("gram_solve(Tensor white, Tensor ridge, Tensor? shares) -> (Tensor, Tensor, Tensor)")
_library.define(
    "kv_solve(Tensor keys, Tensor residuals, Tensor ridge, Tensor? inverse_factor=None, Tensor? shares=None)"
    " -> (Tensor, Tensor, Tensor)"
)


def _kv_solve(
    keys: Tensor,
    residuals: Tensor,
    ridge: Tensor,
    inverse_factor: Tensor | None = None,
    shares: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the composition of ops over whichever kernels its two inner ops have."""
    return reference.kv_solve(keys, residuals, ridge, inverse_factor, shares, torch.ops.kecore)


for _name in ("second_moment_", "factor_product", "gram_solve"):
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
_library.impl("kv_solve", _kv_solve, "CompositeExplicitAutograd")


def _fake_second_moment(
    moments: Sequence[Tensor], keys: Sequence[Tensor], rows: Tensor | None = None, mask: Tensor | None = None
) -> None:
    _check(len(moments) == len(keys), lambda: f"expected as many moments as keys, got {len(moments)}, {len(keys)}")
    _check(rows is None or mask is None, lambda: "expected rows or a mask, got both")
    for moment, key in zip(moments, keys, strict=True):
        _check(
            key.ndim == 2 and moment.shape == (key.shape[1], key.shape[1]),
            lambda m=moment, k=key: f"expected moment [d, d] and keys [tokens, d], got {m.shape} and {k.shape}",
        )


def _fake_factor_product(factor: Tensor, x: Tensor, transposed: bool) -> Tensor:
    _check(
        x.ndim == 3 and factor.shape == (x.shape[1], x.shape[1]),
        lambda: f"expected factor [d, d] and x [batch, d, n], got {factor.shape} and {x.shape}",
    )
    return x.new_empty(x.shape)


def _fake_gram_solve(white: Tensor, ridge: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    _check(white.ndim == 3, lambda: f"expected white [batch, d, n], got {white.shape}")
    batch, _, n = white.shape
    u = n if shares is None else shares.shape[2]
    gram = white.new_empty((batch, n, n), dtype=torch.float64)
    weights = white.new_empty((batch, n, u), dtype=torch.float64)
    pivots = white.new_empty((batch, 2), dtype=torch.float64)
    return gram, weights, pivots


def _fake_kv_solve(
    keys: Tensor,
    residuals: Tensor,
    ridge: Tensor,
    inverse_factor: Tensor | None = None,
    shares: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(
        keys.ndim == 3 and residuals.ndim == 3,
        lambda: f"expected keys [batch, d, n] and residuals [batch, d_out, u], got {keys.shape}, {residuals.shape}",
    )
    batch, d, _ = keys.shape
    edit_residual = keys.new_empty(batch, dtype=torch.float64)
    return keys.new_empty(batch, d, residuals.shape[2]), edit_residual, torch.empty_like(edit_residual)


for _name, _fake in {
    "second_moment_": _fake_second_moment,
    "factor_product": _fake_factor_product,
    "gram_solve": _fake_gram_solve,
    "kv_solve": _fake_kv_solve,
}.items():
    torch.library.register_fake(f"kecore::{_name}", _fake, lib=_library)
