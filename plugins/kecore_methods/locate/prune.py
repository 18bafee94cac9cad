"""PRUNE: MEMIT, whose summed updates never stretch a direction much more than the unedited weight does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kecore.api.config import StageSettings
from kecore.edit import LowRank, Update, factors_of
from kecore.engine.closed_form import ClosedForm
from kecore.engine.post import EditedSite, Post
from kecore_methods.locate.memit import LeastSquares

__all__ = ["Prune", "RestrainedSpectrum", "restrained_spectrum"]


class Prune(LeastSquares):
    """Perturbation Restraint on Upper bouNd for Editing: see :func:`restrained_spectrum`."""

    class Config(LeastSquares.Config):
        """Configuration of PRUNE."""

        own_stages: ClassVar[tuple[str, ...]] = ("prune",)

    name = "prune"
    reference = "Ma et al., Perturbation-Restrained Sequential Model Editing, ICLR 2025, arXiv:2405.16821"


class RestrainedSpectrum:
    """Hold the singular values of all updates' sum near the weight's largest."""

    class Settings(StageSettings):
        """Settings of the stage."""

        base: float = Field(
            default=1.2, gt=1, description="Base of the logarithm that large singular values are reduced by."
        )

    name = "prune"
    reference = Prune.reference
    api = (1, 1)

    def apply(self, form: ClosedForm, settings: RestrainedSpectrum.Settings) -> ClosedForm:
        """Return the form with this stage in it."""
        return form.with_post(restrained_spectrum(settings.base))


def restrained_spectrum(base: float) -> Post:
    """Return PRUNE's post: it holds the singular values of all updates' sum near the unedited weight's largest.

    The restraint of arXiv 2405.16821: with ``m`` the largest singular value of ``W``, each ``σ > m`` of the
    summed update becomes ``log_base(σ) - log_base(m) + m`` where that is less, and the others stay. The paper does it
    once, after the last edit. Here each edit leaves the sum restrained: the update that is returned leads from the
    restrained sum of the updates before to that of all updates.

    Args:
        base: base of the logarithm, above 1; a larger one restrains more.
    """

    def post(site: EditedSite, update: Update) -> Update:
        name = f"prune/{site.id}"
        if f"{name}/top" not in site.state:
            site.state[f"{name}/top"] = torch.tensor(_largest_singular_value(site.weight))
        top = float(site.state[f"{name}/top"])
        u, v = factors_of(update)
        before: _Svd | None = None  # of the sum of all updates before this one, as they were asked for
        if f"{name}/U" in site.state:
            before = _factored_svd(site.state[f"{name}/U"], site.state[f"{name}/V"])
            u = torch.cat([before.u * before.s, u.double()], dim=1)
            v = torch.cat([before.v, v.double()], dim=1)
        total = _factored_svd(u, v)
        site.state[f"{name}/U"], site.state[f"{name}/V"] = (total.u * total.s).float(), total.v.float()
        largest = float(total.s.max())
        if before is not None:
            largest = max(largest, float(before.s.max()))
        if largest <= top:
            return update
        u, v = total.u * _restrain(total.s, top, base), total.v
        if before is not None:
            # The weight has the restrained sum of the updates before on it, which is taken off.
            u = torch.cat([u, before.u * -_restrain(before.s, top, base)], dim=1)
            v = torch.cat([v, before.v], dim=1)
        return LowRank(u.float(), v.float())

    return post


@dataclass(frozen=True, slots=True)
class _Svd:
    """A thin singular value decomposition ``U diag(s) Vᵀ`` of a ``[d_out, d_in]`` matrix of rank ``r``.

    Args:
        u: ``[d_out, r]`` float64.
        s: ``[r]`` float64, descending.
        v: ``[d_in, r]`` float64.
    """

    u: Tensor
    s: Tensor
    v: Tensor


def _factored_svd(u: Tensor, v: Tensor) -> _Svd:
    """Decompose ``u vᵀ`` without forming it; singular values of rounding size are left out.

    Args:
        u: ``[d_out, k]``.
        v: ``[d_in, k]``.
    """
    u_basis, u_triangle = torch.linalg.qr(u.double())
    v_basis, v_triangle = torch.linalg.qr(v.double())
    inner_u, s, inner_v = torch.linalg.svd(u_triangle @ v_triangle.t(), full_matrices=False)  # [k, k], [k], [k, k]
    rank = max(1, int((s > 1e-12 * s.max()).sum()))
    return _Svd(u_basis @ inner_u[:, :rank], s[:rank], v_basis @ inner_v[:rank].t())


def _restrain(s: Tensor, top: float, base: float) -> Tensor:
    """Return singular values ``[r]``, of which those above ``top`` grow by their logarithm only."""
    logarithmic = (s.clamp(min=top) / top).log() / math.log(base) + top
    # Below 1 / ln(base) the logarithm is steeper than a line: it would raise values just above ``top``.
    return torch.where(s > top, logarithmic.minimum(s), s)


def _largest_singular_value(weight: Tensor) -> float:
    """Return a weight's largest singular value.

    It is read off the Gram matrix of the shorter side: a full decomposition of a large model's weight takes minutes.
    """
    w = weight.detach().double().cpu()
    gram = w @ w.t() if w.shape[0] <= w.shape[1] else w.t() @ w
    return float(torch.linalg.eigvalsh(gram)[-1].sqrt())
