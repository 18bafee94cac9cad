"""The preservation stage: from keys and residuals to an update that leaves other keys alone."""

from __future__ import annotations

import torch
from torch import Tensor

from kecore.engine.accumulate import Past
from kecore.engine.keys import Keys
from kecore.ops import Solution, kv_solve

__all__ = ["least_squares", "one_by_one"]


def least_squares(
    keys: Keys,
    residuals: Tensor,
    factor: Tensor | None,
    weight: float,
    *,
    absolute: bool = False,
    each: bool = True,
    past: Past | None = None,
) -> Solution:
    """MEMIT's and EMMET's update: residuals against the preserved keys' second moment.

    Args:
        keys: keys of ``u`` groups.
        residuals: ``[d_out, u]``.
        factor: ``L⁻¹`` of the second moment; None for the identity.
        weight: how strongly preserved keys count. Relative: in units of the mean ``kᵀC⁻¹k`` of the new keys,
            so that a lone key realises ``1 / (1 + weight)`` of its residual on any model. Absolute: MEMIT's λ.
        absolute: ``weight`` is λ.
        each: fit the key of every context instead of their mean. The published methods fit the mean; a
            prompt's own key then gets only part of its value.
        past: keys of the edits before, which are to stay where they were mapped; takes the new ones in.
    """
    columns, shares = keys.each(compact=past is None) if each else (keys.mean(), None)
    if not absolute:
        white = columns if factor is None else factor @ columns.to(factor.dtype)
        weight *= float(white.double().square().sum()) / keys.group_count
    if past is not None:
        groups = torch.arange(residuals.shape[1]) if shares is None else shares.argmax(1)
        weight, columns = past.joined(weight, columns, groups)
    return kv_solve(columns, residuals, weight, factor, shares)


def one_by_one(keys: Tensor, residuals: Tensor, factor: Tensor | None, fitted: Tensor | None = None) -> Solution:
    """ROME's rank-one updates, each written exactly on top of the ones before (arXiv 2202.05262, eq. 2).

    Args:
        keys: ``[d_in, u]``, the keys whose direction is written.
        residuals: ``[d_out, u]``.
        factor: ``L⁻¹`` of the second moment; None for the identity.
        fitted: ``[d_in, u]``, the keys that must map to the values; by default ``keys``, as R-ROME
            has it (arXiv 2403.07175). The original ROME fits the bare prompt's key.
    """
    fitted = keys if fitted is None else fitted
    white = keys.double() if factor is None else (factor.t() @ (factor @ keys.to(factor.dtype))).double()
    u = torch.zeros_like(residuals, dtype=torch.float64)
    v = torch.zeros_like(keys, dtype=torch.float64)
    for i in range(keys.shape[1]):
        key = fitted[:, i].double()
        if not bool(key.any()):
            continue  # the group does not use this expert
        v[:, i] = white[:, i] / (white[:, i] @ key)
        u[:, i] = residuals[:, i].double() - u[:, :i] @ (v[:, :i].t() @ key)
    written = u @ (v.t() @ fitted.double())
    error = float((written - residuals.double()).norm() / residuals.double().norm().clamp(min=1e-300))
    return Solution(u.float(), v.float(), error, 1.0)
