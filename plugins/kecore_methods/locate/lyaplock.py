"""LyapLock: a bound on what a whole sequence of edits may cost preserved knowledge, kept by a queue."""

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
from kecore.engine.config import BatchConfig
from kecore.engine.keys import Keys
from kecore.model import ModelView, SiteId
from kecore.ops import Solution
from kecore_methods.presets import Published

__all__ = ["LyapLock", "SiteHistory"]


class LyapLock:
    """Each step weighs preserved keys by a virtual queue, which grows while their loss is above its bound.

    Step ``t`` minimises ``EL(t) + q_t λ PL(t)`` over the whole weight, with the edits' loss
    ``EL = ‖W K_t - V_t‖² + Σ_s ‖W K_s - W_s K_s‖²`` and the preservation loss ``PL = ‖(W - W_0) K_0‖²``. So an update
    also takes back what earlier ones cost, where that costs the edits less.
    """

    class Config(Published, BatchConfig):
        """Configuration of LyapLock."""

        preset_file: ClassVar[str] = "lyaplock"

        preservation: float = Field(
            default=0.05,
            gt=0,
            description="Weight of preserved keys while the queue is at its least, relative to the first edit's own: "
            "a lone edit realises 1 / (1 + preservation) of its residual.",
        )
        preservation_lambda: float | None = Field(
            default=None, gt=0, description="The same as an absolute factor of their second moment (1000, published)."
        )
        bound: float = Field(
            default=60.0,
            gt=1,
            description="Largest mean preservation loss, in units of that of the first edit (alpha, published: 60).",
        )

    name = "lyaplock"
    capabilities = Capabilities(kind="weights", batch=True, sequential=True, needs_statistics=True)
    reference = (
        "Wang et al., LyapLock: Bounded Knowledge Preservation in Sequential Large Language Model Editing, EMNLP 2025, "
        "arXiv:2505.15702"
    )
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> WeightEdit:
        """Plan the edit; the queue and what earlier keys are mapped to travel in ``context.state``."""
        config: LyapLock.Config = context.config
        layers = config.edited_layers(view)
        statistics = context.need_statistics(layers, self.name)

        def solve(site: SiteId, keys: Keys, residuals: Tensor) -> Solution:
            columns, shares = keys.each() if config.each_context else (keys.mean(), None)
            moment = statistics.moment(site)  # [d_in, d_in] float64
            moment = moment + config.statistics_ridge * moment.diagonal().mean() * torch.eye(len(moment)).double()
            if config.preservation_lambda is None:
                white = statistics.factor(site, config.statistics_ridge) @ columns
                weight = config.preservation * float(white.double().square().sum()) / keys.group_count
            else:
                weight = config.preservation_lambda
            history = SiteHistory(context.state, site)
            history.close(view.site(site).linear.weight, moment, config.bound)
            return history.write(columns, residuals, shares, moment, weight)

        return config.engine(layers, solve=solve).plan(view, batch, context, self.name)


class SiteHistory:
    """What LyapLock remembers of one site; its size does not depend on how many edits there were.

    The queue, the weight that the session began with, the last edit's keys, and two sums over the edits before it:
    ``Σ K_s K_sᵀ`` and ``Σ D_s K_s K_sᵀ`` with ``D_s = W_s - W_0``.

    Args:
        state: tensors that survive from one edit to the next; read and written.
        site: which site.
    """

    def __init__(self, state: dict[str, Tensor], site: SiteId) -> None:
        self.state, self.site = state, site
        self.deviation: Tensor | None = None  # D = W - W_0 [d_out, d_in] float64; None at the session's first edit

    @property
    def queue(self) -> float:
        """The virtual queue in units of its least value, ``q >= 1``."""
        return float(self.state.get(self._key("queue"), 1.0))

    def close(self, weight: Tensor, moment: Tensor, bound: float) -> None:
        """Enter what the last edit did: where its keys are mapped to now, and what it cost preserved ones.

        The paper's queue is ``Z(t+1) = max(Z(t) + a (PL(t) - αD), Z_max)``, in the released code with
        ``a = 1 / √(αD)`` and ``Z_max = √(αD)``, where ``D`` is the loss after the first edit. With ``q = a Z`` that is
        ``q ← max(q + PL / (αD) - 1, 1)``.

        Args:
            weight: ``W [d_out, d_in]``, with all edits so far.
            moment: second moment of preserved keys, ``[d_in, d_in]`` float64.
            bound: ``α``.
        """
        state = self.state
        if self._key("origin") not in state:
            state[self._key("origin")] = weight.detach().cpu().clone()
            return
        deviation = weight.detach().cpu().double() - state[self._key("origin")].double()  # D, [d_out, d_in]
        loss = float((deviation @ moment * deviation).sum())  # PL
        first_loss = state.setdefault(self._key("first-loss"), torch.tensor(loss, dtype=torch.float64))
        limit = bound * float(first_loss)
        if limit > 0:
            state[self._key("queue")] = torch.tensor(max(self.queue + loss / limit - 1, 1.0), dtype=torch.float64)
        last_keys = state[self._key("last-keys")].double()  # [d_in, c]
        self._add("products", deviation @ last_keys @ last_keys.t())  # [d_out, d_in]
        self._add("keys", last_keys @ last_keys.t())  # [d_in, d_in]
        self.deviation = deviation

    def write(
        self, columns: Tensor, residuals: Tensor, shares: Tensor | None, moment: Tensor, weight: float
    ) -> Solution:
        """Return this edit's update ``B A⁻¹``, and note its keys.

        ``A = K Kᵀ + Σ K_s K_sᵀ + q λ C`` and ``B = R Kᵀ + Σ (D_s - D) K_s K_sᵀ - q λ D C``.

        Args:
            columns: ``K [d_in, c]``.
            residuals: ``R [d_out, u]``.
            shares: ``[c, u]``, see :meth:`Keys.each`; None where each group has one column.
            moment: ``C [d_in, d_in]`` float64.
            weight: ``λ``, for the session's first edit; later ones keep it.

        Raises:
            NumericalError: the system is not positive definite.
        """
        keys = columns.double()
        first_weight = self.state.setdefault(self._key("weight"), torch.tensor(weight, dtype=torch.float64))
        preserved = self.queue * float(first_weight) * moment  # q λ C
        targets = torch.eye(keys.shape[1], dtype=torch.float64) if shares is None else shares.double()  # [c, u]
        system = keys @ keys.t() + preserved  # A
        if self.deviation is not None:
            system = system + self.state[self._key("keys")].double()
        root, failed = torch.linalg.cholesky_ex(system)
        if bool(failed):
            raise NumericalError(
                f"site {self.site}: preserved keys do not span all directions, and the rest has no solution; raise "
                "'statistics_ridge', or collect more tokens"
            )
        left, right = residuals.double(), torch.cholesky_solve(keys @ targets, root)  # [d_out, u], A⁻¹ K P [d_in, u]
        if self.deviation is not None:  # what concerns earlier keys and preserved ones has no few columns
            moved = self.state[self._key("products")].double() - self.deviation @ (system - keys @ keys.t())
            left = left @ right.t() + torch.cholesky_solve(moved.t(), root).t()  # [d_out, d_in]
            right = torch.eye(len(keys), dtype=torch.float64)
        self.state[self._key("last-keys")] = columns
        wanted = residuals.double() @ targets.t()  # [d_out, c]
        missed = left @ (right.t() @ keys) - wanted
        pivots = root.diagonal()
        return Solution(
            left.float(),
            right.float(),
            float(missed.norm() / wanted.norm().clamp(min=1e-300)),
            float((pivots.max() / pivots.min()).square()),
        )

    def _key(self, name: str) -> str:
        return f"{name}/{self.site}"

    def _add(self, name: str, matrix: Tensor) -> None:
        """Add a float64 matrix to one that is kept in float32."""
        earlier = self.state.get(self._key(name))
        self.state[self._key(name)] = (matrix if earlier is None else earlier.double() + matrix).float()
