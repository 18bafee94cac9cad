"""PRUNE: MEMIT, whose summed updates never stretch a direction much more than the unedited weight does."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
        """What may be chosen."""

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
    """PRUNE: singular values of the sum of all updates are held near the largest one of the unedited weight.

    The restraint of arXiv 2405.16821: with ``m`` the largest singular value of ``W``, each ``σ > m`` of the
    summed update becomes ``log_base(σ) - log_base(m) + m`` where that is less, and the others stay. The paper does it
    once, after the last edit. Here each edit leaves the sum restrained: the update that is returned is what is missing
    to the restrained sum of all that was asked for, from the restrained sum before it.

    Args:
        base: base of the logarithm, above 1; a larger one restrains more.
    """

    def post(site: EditedSite, update: Update) -> Update:
        name = f"prune/{site.id}"
        if f"{name}/top" not in site.state:
            site.state[f"{name}/top"] = torch.tensor(_largest_singular_value(site.weight))
        top = float(site.state[f"{name}/top"])
        before = [_thin(site.state[f"{name}/U"], site.state[f"{name}/V"])] if f"{name}/U" in site.state else []
        u, s, v = _thin(*_summed([*before, factors_of(update)]))
        site.state[f"{name}/U"], site.state[f"{name}/V"] = (u * s).float(), v.float()
        if max(float(x.max()) for _, x, _ in [(u, s, v), *before]) <= top:
            return update
        now = [(u, _restrained(s, top, base), v)]
        then = [(a, -_restrained(b, top, base), c) for a, b, c in before]
        return LowRank(*(part.float() for part in _summed([*now, *then])))

    return post


def _summed(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
    """Factors of the sum of ``U diag(s) Vᵀ`` (or ``U Vᵀ``), side by side."""
    left = [part[0] if len(part) == 2 else part[0] * part[1] for part in parts]
    return torch.cat([x.double() for x in left], 1), torch.cat([part[-1].double() for part in parts], 1)


def _thin(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of ``u vᵀ`` without forming it, float64; singular values of rounding size go."""
    left, r = torch.linalg.qr(u.double())
    right, t = torch.linalg.qr(v.double())
    a, s, b = torch.linalg.svd(r @ t.t(), full_matrices=False)
    rank = max(1, int((s > 1e-12 * s.max()).sum()))
    return left @ a[:, :rank], s[:rank], right @ b[:rank].t()


def _restrained(s: Tensor, top: float, base: float) -> Tensor:
    above = (s.clamp(min=top) / top).log() / math.log(base) + top
    # Below 1 / ln(base) the logarithm is steeper than a line: it would raise values just above ``top``.
    return torch.where(s > top, above.minimum(s), s)


def _largest_singular_value(weight: Tensor) -> float:
    """From the Gram matrix of the shorter side: a full decomposition of a large model's matrix takes minutes."""
    w = weight.detach().double().cpu()
    gram = w @ w.t() if w.shape[0] <= w.shape[1] else w.t() @ w
    return float(torch.linalg.eigvalsh(gram)[-1].sqrt())
