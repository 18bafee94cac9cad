"""AlphaEdit: updates that live where preserved knowledge has no keys."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kecore.api.method import MethodContext
from kecore.api.types import Capabilities
from kecore.batch import RequestBatch
from kecore.edit import WeightEdit
from kecore.engine.accumulate import append, fold, gathered
from kecore.engine.config import BatchConfig
from kecore.engine.keys import Keys
from kecore.engine.needs import Shape
from kecore.model import ModelView, SiteId
from kecore.ops import Solution, kv_solve
from kecore.statistics import KeyStatistics
from kecore_methods import hparams
from kecore_methods.hparams import HparamsTable
from kecore_methods.presets import Published

__all__ = ["AlphaEdit", "InNullSpace", "NullSpace", "Projected"]


class NullSpace:
    """Directions that preserved keys hardly use (AlphaEdit, arXiv 2410.02355, eq. 8).

    The basis ``U_s`` of the directions that they *do* use is stored: ``P k = k - U_s (U_sᵀ k)`` costs less than a
    ``d x d`` projector and leaks less.

    Args:
        statistics: second moments.
        site: which site.
        threshold: a direction is used if its eigenvalue exceeds this; relative: times the mean eigenvalue.
        absolute: ``threshold`` is an eigenvalue.
    """

    def __init__(self, statistics: KeyStatistics, site: SiteId, threshold: float, *, absolute: bool = False) -> None:
        eigenvalues, eigenvectors = statistics.spectrum(site)  # [d_in] descending, [d_in, d_in]
        limit = threshold if absolute else threshold * float(eigenvalues.mean())
        self.rank = int((eigenvalues > limit).sum())
        self.used = eigenvectors[:, : self.rank]  # [d_in, rank]

    def project(self, keys: Tensor) -> Tensor:
        """Return ``P keys``, ``[d_in, u]`` float32."""
        k = keys.double()
        return (k - self.used @ (self.used.t() @ k)).float()


class InNullSpace(ABC):
    """The base of AlphaEdit and its relatives: keys without the directions that preserved ones use."""

    class Config(Published, BatchConfig):
        """Configuration that AlphaEdit shares with its relatives."""

        relative_threshold: float = Field(
            default=1.0,
            gt=0,
            description="A direction belongs to preserved keys if its eigenvalue exceeds this times the mean.",
        )
        eigenvalue_threshold: float | None = Field(
            default=None,
            gt=0,
            description="The same as an absolute eigenvalue (2e-2 in the paper's code for Llama-3).",
        )
        l2: float = Field(
            default=0.1,
            gt=0,
            description="Length penalty, relative to the mean squared norm of the projected keys; of a session's edits "
            "one after another, to those of the first.",
        )
        l2_lambda: float | None = Field(
            default=None, gt=0, description="The same as an absolute number (10 in the paper's code)."
        )

        def memory_shape(self, view: ModelView) -> Shape:
            """Return what of this configuration decides memory."""
            return replace(super().memory_shape(view), derived="spectrum")

    name: ClassVar[str]
    capabilities = Capabilities(kind="weights", batch=True, sequential=True, needs_statistics=True)
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> WeightEdit:
        """Plan the edit; keys of all edits so far travel in ``context.state``."""
        config: InNullSpace.Config = context.config
        layers = config.edited_layers(view)
        statistics = context.need_statistics(layers, self.name)
        absolute = config.eigenvalue_threshold is not None
        threshold = config.relative_threshold if config.eigenvalue_threshold is None else config.eigenvalue_threshold
        subjects = config.grouped(layers, batch).subjects

        def solve(site: SiteId, keys: Keys, residuals: Tensor) -> Solution:
            if config.each_context:
                columns, shares = keys.each()  # [d_in, c], [c, u]
            else:
                columns, shares = keys.mean(), None  # [d_in, u]
            null_space = NullSpace(statistics, site, threshold, absolute=absolute)
            projected_keys = null_space.project(columns)
            mean_square = float(projected_keys.double().square().sum()) / keys.group_count
            ridge = config.l2 * mean_square if config.l2_lambda is None else config.l2_lambda
            new = Projected(
                site=site,
                subjects=subjects,
                keys=projected_keys,
                shares=shares,
                residuals=residuals,
                size=mean_square,
            )
            return self.write(new, ridge, context)

        return config.engine(layers, solve=solve).plan(view, batch, context, self.name)

    @abstractmethod
    def write(self, new: Projected, ridge: float, context: MethodContext) -> Solution:
        """Return the update of one site; ``context.state`` holds the edits before and takes this one in."""


@dataclass(frozen=True, slots=True)
class Projected:
    """Keys in the null space, and the residuals that they are to be mapped to.

    Args:
        site: the site whose weight is edited.
        subjects: subject of each of ``u`` groups.
        keys: ``[d_in, c]`` columns.
        shares: ``[c, u]``, see :meth:`Keys.each`; None where each group has one column.
        residuals: ``[d_out, u]``.
        size: mean squared norm of a group's keys.
    """

    site: SiteId
    subjects: Sequence[str]
    keys: Tensor
    shares: Tensor | None
    residuals: Tensor
    size: float


class AlphaEdit(InNullSpace):
    """Null-space constrained editing; keys of earlier edits are kept and stay where they were mapped."""

    class Config(InNullSpace.Config):
        """Configuration of AlphaEdit."""

        preset_file: ClassVar[str] = "alphaedit"
        hparams_table: ClassVar[HparamsTable | None] = hparams.ALPHAEDIT

    name = "alphaedit"
    reference = (
        "Fang et al., AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models, ICLR 2025, "
        "arXiv:2410.02355"
    )

    def write(self, new: Projected, ridge: float, context: MethodContext) -> Solution:
        """Weigh the keys of earlier edits against the new ones in one system.

        A relative length penalty is in units of the first edit's keys, so that the edits of a session are one
        least-squares problem; of earlier keys that needs ``K Kᵀ`` alone.
        """
        config: AlphaEdit.Config = context.config
        state, keys = context.state, f"keys/{new.site}"
        first_size = state.setdefault(f"size/{new.site}", torch.tensor(new.size, dtype=torch.float64))
        if config.l2_lambda is None:
            ridge = config.l2 * float(first_size)
        fold(state, keys)
        append(state, keys, new.keys)
        return kv_solve(gathered(state, keys), new.residuals, ridge, shares=new.shares)
