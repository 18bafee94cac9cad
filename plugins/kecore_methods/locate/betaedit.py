"""BetaEdit: AlphaEdit with a price on what leaks out of the null space, and a null space that is found anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kecore.api.errors import NumericalError
from kecore.api.method import MethodContext
from kecore.batch import RequestBatch
from kecore.edit import WeightEdit
from kecore.engine.accumulate import append, fold, gathered
from kecore.engine.keys import Keys
from kecore.model import ModelView, SiteId
from kecore.ops import Solution, kv_solve
from kecore.statistics import KeyStatistics
from kecore_methods.locate.alphaedit import InNullSpace

__all__ = ["BetaEdit", "Weights", "free_directions"]


@dataclass(frozen=True, slots=True)
class Weights:
    """Numbers of one site's system, in the units of its keys.

    Args:
        threshold: largest eigenvalue of what is protected in a direction that is free.
        ridge: factor of ``‖Δ‖²``.
        leakage: factor of ``‖Δ K_0‖²``.
    """

    threshold: float
    ridge: float
    leakage: float


class BetaEdit:
    """Null-space editing for massive sequences: penalised leakage, and a null space refreshed every so many facts."""

    class Config(InNullSpace.Config):
        """Configuration of BetaEdit."""

        preset_file: ClassVar[str] = "betaedit"

        leakage: float = Field(
            default=6.0,
            ge=0,
            description="Weight of preserved keys inside the null space: of a direction at the threshold, relative to "
            "the length penalty (published: 3000 * 0.02 / 10).",
        )
        leakage_lambda: float | None = Field(
            default=None, ge=0, description="The same as an absolute factor of their second moment (3000, published)."
        )
        refresh: int = Field(
            default=1000, ge=1, description="Facts after which the null space is found anew (tau, published: 1000)."
        )

    name = "betaedit"
    capabilities = InNullSpace.capabilities
    reference = "Liu et al., BetaEdit: Null-Space Constrained Sequential Model Editing, IJCAI 2026, arXiv:2605.09285"
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> WeightEdit:
        """Plan the edit; keys of all edits so far, and the present null space, travel in ``context.state``."""
        config: BetaEdit.Config = context.config
        layers = config.edited_layers(view)
        statistics = context.need_statistics(layers, self.name)

        def solve(site: SiteId, keys: Keys, residuals: Tensor) -> Solution:
            columns, shares = keys.each() if config.each_context else (keys.mean(), None)
            return _write(site, columns, residuals, shares, statistics, context)

        return config.engine(layers, solve=solve).plan(view, batch, context, self.name)


def free_directions(protected: Tensor, threshold: float, preserved: Tensor) -> tuple[Tensor, Tensor]:
    """Return the directions that protected keys hardly use, turned so that preserved keys are uncorrelated in them.

    Args:
        protected: ``[d_in, d_in]`` float64, second moment of the protected keys.
        threshold: an eigenvalue below it belongs to a free direction.
        preserved: ``[d_in, d_in]`` float64, ``C``.

    Returns:
        An orthonormal basis ``N [d_in, m]``, and the diagonal of ``Nᵀ C N``, which has nothing beside it: ``[m]``.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(protected)
    free = eigenvectors[:, eigenvalues < threshold]  # [d_in, m]
    leaks, turn = torch.linalg.eigh(free.t() @ preserved @ free)  # [m], [m, m]
    return free @ turn, leaks.clamp(min=0)


def _write(
    site: SiteId,
    columns: Tensor,
    residuals: Tensor,
    shares: Tensor | None,
    statistics: KeyStatistics,
    context: MethodContext,
) -> Solution:
    """Return ``Δ = R Kᵀ P (P (K Kᵀ + Σ K_s K_sᵀ + λ_1 C) P + λ_2 I)⁻¹`` of one site, and take its keys in.

    Args:
        site: the site.
        columns: ``K [d_in, c]``.
        residuals: ``R [d_out, u]``.
        shares: ``[c, u]``, see :meth:`Keys.each`; None where each group has one column.
        statistics: second moments of preserved keys.
        context: configuration and state.
    """
    state, name = context.state, f"keys/{site}"
    eigenvalues, eigenvectors = statistics.spectrum(site)  # [d_in] descending, [d_in, d_in]
    threshold, is_free = _threshold(context.config, eigenvalues)
    basis, leaks = eigenvectors[:, is_free], eigenvalues[is_free].clamp(min=0)  # [d_in, m], [m]
    size = float((basis.t() @ columns.double()).square().sum()) / residuals.shape[1]
    first_size = state.setdefault(f"size/{site}", torch.tensor(size, dtype=torch.float64))
    weights = _weights(context.config, threshold, float(first_size))
    fold(state, name)
    basis, leaks = _refreshed(site, basis, leaks, weights, statistics, context)
    if not len(leaks):
        raise NumericalError(
            f"site {site}: preserved keys use every direction, so there is no null space to write in; raise "
            "'relative_threshold' or 'eigenvalue_threshold'"
        )
    append(state, name, columns)
    state[f"count/{site}"] = state.get(f"count/{site}", torch.tensor(0)) + residuals.shape[1]
    # In these coordinates λ_1 C + λ_2 I is diagonal: its square root whitens the keys.
    scale = (weights.leakage * leaks + weights.ridge).rsqrt()  # [m]
    white = scale[:, None] * (basis.t() @ gathered(state, name).double())  # [m, all keys so far]
    solution = kv_solve(white.float(), residuals, 1.0, shares=shares)
    return solution._replace(V=(basis @ (scale[:, None] * solution.V.double())).float())


def _threshold(config: BetaEdit.Config, eigenvalues: Tensor) -> tuple[float, Tensor]:
    """Return the largest eigenvalue of a free direction, and which directions are free, ``[d_in]``."""
    threshold = config.eigenvalue_threshold
    if threshold is None:
        threshold = config.relative_threshold * float(eigenvalues.mean())
    return threshold, eigenvalues < threshold


def _weights(config: BetaEdit.Config, threshold: float, first_size: float) -> Weights:
    ridge = config.l2 * first_size if config.l2_lambda is None else config.l2_lambda
    leakage = config.leakage_lambda
    if leakage is None:
        leakage = config.leakage * ridge / threshold
    return Weights(threshold, ridge, leakage)


def _refreshed(
    site: SiteId, basis: Tensor, leaks: Tensor, weights: Weights, statistics: KeyStatistics, context: MethodContext
) -> tuple[Tensor, Tensor]:
    """Return the free directions of this edit: those of the preserved keys, or of these and the edits' keys.

    After every ``refresh`` facts, what is protected is ``(Σ K_s K_sᵀ / n + λ_1 C) / (λ_1 + 1)`` of the ``n`` facts
    so far, and its free directions serve until the next time.
    """
    state, config = context.state, context.config
    count, last = int(state.get(f"count/{site}", 0)), int(state.get(f"refreshed/{site}", 0))
    if count - last >= config.refresh:
        keys = gathered(state, f"keys/{site}").double()  # [d_in, n]
        preserved = statistics.moment(site)
        protected = (keys @ keys.t() / count + weights.leakage * preserved) / (weights.leakage + 1)
        new_basis, new_leaks = free_directions(protected, weights.threshold, preserved)
        state[f"basis/{site}"], state[f"leaks/{site}"] = new_basis.float(), new_leaks
        state[f"refreshed/{site}"] = torch.tensor(count)
    if f"basis/{site}" in state:
        return state[f"basis/{site}"].double(), state[f"leaks/{site}"]
    return basis, leaks
