"""RLSEdit: a sequence of edits as one regularised least-squares problem, solved step by step."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kecore.api.errors import NumericalError
from kecore.api.method import MethodContext
from kecore.api.types import Capabilities
from kecore.batch import RequestBatch
from kecore.edit import WeightEdit
from kecore.engine.accumulate import append, fold, gathered
from kecore.engine.keys import Keys
from kecore.model import ModelView, SiteId
from kecore.ops import Solution
from kecore_methods.locate.memit import PreservedConfig

__all__ = ["Recursion", "RlsEdit"]


class Recursion:
    """The recursion of one site: ``C_t = (λ²I + μ²K_0K_0ᵀ + Σ_{s≤t} K_s K_sᵀ)⁻¹`` (arXiv 2601.15686, section 4).

    With ``F = C_{t-1} K`` and ``S = I + Kᵀ F``, the Woodbury identity gives ``C_t = C_{t-1} - F S⁻¹ Fᵀ`` and
    ``C_t K = F S⁻¹``. What is remembered is ``C_0 - C_t``, as columns ``G`` with ``G Gᵀ`` equal to it: each edit adds
    as many as it has keys, and once they are more than ``d_in`` they are folded into ``d_in``.

    Args:
        state: tensors that survive from one edit to the next; read and written.
        site: which site.
        factor: ``L⁻¹`` with ``L Lᵀ`` proportional to ``C_0⁻¹``, ``[d_in, d_in]``.
    """

    def __init__(self, state: dict[str, Tensor], site: SiteId, factor: Tensor) -> None:
        self.state, self.factor = state, factor
        self.name, self.weight_name = f"rls/{site}", f"weight/{site}"

    def write(
        self, columns: Tensor, residuals: Tensor, shares: Tensor | None, weight: float, *, absolute: bool
    ) -> Solution:
        """Return this edit's update, and take its keys in.

        Args:
            columns: ``K [d_in, c]``, the new keys.
            residuals: ``[d_out, u]``, what is missing at them: ``V - W K``.
            shares: ``[c, u]``, see :meth:`Keys.each`; None where each group has one column.
            weight: of ``C_0⁻¹``, for the session's first edit; later ones keep its weight.
            absolute: ``weight`` is ``C_0⁻¹ / (L Lᵀ)``; else it is in units of the first keys' mean ``kᵀ(L Lᵀ)⁻¹k``.

        Raises:
            NumericalError: the system has no solution in float64.
        """
        keys = columns.double()
        start = (self.factor.t() @ (self.factor @ columns.to(self.factor.dtype))).double()  # (L Lᵀ)⁻¹ K, [d_in, c]
        if not absolute:
            weight *= float((keys * start).sum()) / residuals.shape[1]
        first_weight = self.state.setdefault(self.weight_name, torch.tensor(weight, dtype=torch.float64))
        gain = start / float(first_weight)  # C_0 K
        fold(self.state, self.name)
        if f"{self.name}/0" in self.state:
            earlier = gathered(self.state, self.name).double()  # [d_in, columns so far]
            gain = gain - earlier @ (earlier.t() @ keys)  # F = C_{t-1} K
        system = keys.t() @ gain  # [c, c]
        system = 0.5 * (system + system.t())
        system.diagonal().add_(1.0)  # S
        root, failed = torch.linalg.cholesky_ex(system)
        if bool(failed):
            raise NumericalError(
                f"site {self.name}: the recursion lost its positive definiteness; raise 'preservation' or 'norm_weight'"
            )
        # G_t = F L_S⁻ᵀ with S = L_S L_Sᵀ, so that G_t G_tᵀ = F S⁻¹ Fᵀ.
        columns_of_gain = torch.linalg.solve_triangular(root, gain.t(), upper=False).t()  # [d_in, c]
        append(self.state, self.name, columns_of_gain.float())
        targets = torch.eye(keys.shape[1], dtype=torch.float64) if shares is None else shares.double()  # [c, u]
        right = gain @ torch.cholesky_solve(targets, root)  # C_t K P, [d_in, u]
        wanted = residuals.double() @ targets.t()  # [d_out, c]
        missed = residuals.double() @ (right.t() @ keys) - wanted
        pivots = root.diagonal()
        return Solution(
            residuals.float(),
            right.float(),
            float(missed.norm() / wanted.norm().clamp(min=1e-300)),
            float((pivots.max() / pivots.min()).square()),
        )


class RlsEdit:
    """Recursive least squares: soft writes, softly tied to the pre-trained weights and to what they answer.

    ``min_W Σ_s ‖W K_s - V_s‖² + λ²‖W - W_0‖² + μ²‖(W - W_0) K_0‖²`` over all edits so far. What an edit costs does not
    depend on how many came before.
    """

    class Config(PreservedConfig):
        """Configuration of RLSEdit: ``preservation`` is μ², ``norm_weight`` λ² beside it."""

        preset_file: ClassVar[str] = "rlsedit"

        norm_weight: float = Field(
            default=0.07, ge=0, description="λ², relative to μ² times the preserved keys' mean square."
        )
        norm_lambda: float | None = Field(
            default=None, gt=0, description="λ² as a number; needs preservation_lambda, which is μ² then."
        )

    name = "rlsedit"
    capabilities = Capabilities(kind="weights", batch=True, sequential=True, needs_statistics=True)
    reference = (
        "Wang et al., Beyond Hard Writes and Rigid Preservation: Soft Recursive Least-Squares for Lifelong LLM "
        "Editing, IJCAI 2026, arXiv:2601.15686"
    )
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> WeightEdit:
        """Plan the edit; the recursion travels in ``context.state``."""
        config: RlsEdit.Config = context.config
        layers = config.edited_layers(view)
        statistics = context.need_statistics(layers, self.name)
        absolute = config.preservation_lambda is not None
        weight = config.preservation if config.preservation_lambda is None else config.preservation_lambda

        def solve(site: SiteId, keys: Keys, residuals: Tensor) -> Solution:
            columns, shares = keys.each() if config.each_context else (keys.mean(), None)
            factor = statistics.factor(site, config.statistics_ridge + config.norm(statistics, site))
            recursion = Recursion(context.state, site, factor)
            return recursion.write(columns, residuals, shares, weight, absolute=absolute)

        return config.engine(layers, solve=solve).plan(view, batch, context, self.name)
