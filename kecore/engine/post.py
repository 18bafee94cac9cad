"""The post-processing stage: what is done to an update before it is used.

A :data:`Post` takes a :class:`Site` and an update and returns another update; :func:`chained` runs several, in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kecore.edit import Dense, LowRank, Update
from kecore.engine.accumulate import append, gathered
from kecore.engine.keys import Keys
from kecore.ops import kv_solve

__all__ = [
    "Post",
    "Site",
    "besides_principal_directions",
    "chained",
    "largest_relative_changes",
    "restrained_spectrum",
    "simulated_ideal",
    "untouched",
]


@dataclass(frozen=True, slots=True)
class Site:
    """Where an update goes.

    Args:
        layer: index of the layer.
        weight: ``[d_out, d_in]``, the model's own, as it is before the update, with all edits so far on it.
        keys: keys that the update was made for.
        state: tensors that survive to the next edit of the sequence; a stage prefixes its keys with its own name.
    """

    layer: int
    weight: Tensor
    keys: Keys
    state: dict[str, Tensor] = field(default_factory=dict)


Post = Callable[[Site, Update], Update]


def untouched(_site: Site, update: Update) -> Update:
    """The update as it is."""
    return update


def chained(posts: Sequence[Post]) -> Post:
    """One stage that runs several, in order."""

    def run(site: Site, update: Update) -> Update:
        for post in posts:
            update = post(site, update)
        return update

    return run if posts else untouched


def largest_relative_changes(kept: float) -> Post:
    """RECT: entries of an update that change their weight little, relative to its size, are dropped.

    arXiv 2401.04700: of the entries of ``ΔW``, those with the largest ``|ΔW_ij / W_ij|`` hold the edit and
    keep their values; the rest is set to zero.

    Args:
        kept: share of the entries that stay, 0 to 1.
    """

    def post(site: Site, update: Update) -> Update:
        delta = update.matrix()
        # Where both are zero nothing changes; where only the weight is, the change is infinite.
        change = (delta / site.weight.to(delta)).abs().nan_to_num(nan=0.0, posinf=math.inf).flatten()
        strongest = change.topk(max(1, round(kept * change.numel()))).indices
        chosen = torch.zeros_like(change, dtype=torch.bool).index_fill(0, strongest, True)
        return Dense(torch.where(chosen.reshape(delta.shape), delta, 0.0))

    return post


def restrained_spectrum(base: float) -> Post:
    """PRUNE: singular values of the sum of all updates are held near the largest one of the unedited weight.

    The restraint of arXiv 2405.16821: with ``m`` the largest singular value of ``W``, each ``σ > m`` of the
    summed update becomes ``log_base(σ) - log_base(m) + m`` where that is less, and the others stay. The paper does it
    once, after the last edit. Here each edit leaves the sum restrained: the update that is returned is what is missing
    to the restrained sum of all that was asked for, from the restrained sum before it.

    Args:
        base: base of the logarithm, above 1; a larger one restrains more.
    """

    def post(site: Site, update: Update) -> Update:
        name = f"prune/{site.layer}"
        if f"{name}/top" not in site.state:
            site.state[f"{name}/top"] = torch.tensor(_largest_singular_value(site.weight))
        top = float(site.state[f"{name}/top"])
        before = [_thin(site.state[f"{name}/U"], site.state[f"{name}/V"])] if f"{name}/U" in site.state else []
        u, s, v = _thin(*_summed([*before, _factors(update)]))
        site.state[f"{name}/U"], site.state[f"{name}/V"] = (u * s).float(), v.float()
        if max(float(x.max()) for _, x, _ in [(u, s, v), *before]) <= top:
            return update
        now = [(u, _restrained(s, top, base), v)]
        then = [(a, -_restrained(b, top, base), c) for a, b, c in before]
        return LowRank(*(part.float() for part in _summed([*now, *then])))

    return post


def besides_principal_directions(ratio: float, suppression: float) -> Post:
    """SPHERE: an update leaves alone the directions that the rows of its weight crowd around.

    arXiv 2510.01172: rows are neurons on a sphere, so each is scaled to length one; the eigenvectors of their second
    moment with the largest eigenvalues are the principal directions ``Q``, and ``ΔW`` becomes
    ``ΔW (I - suppression·Q Qᵀ)``.

    Args:
        ratio: share of the eigenvalues' sum that the principal directions hold at least, 0 to 1.
        suppression: how much of the update along them goes; 1 is all.
    """

    def post(site: Site, update: Update) -> Update:
        rows = site.weight.detach().double().cpu()
        rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        # The right singular vectors of rows are the eigenvectors of their second moment.
        directions = torch.linalg.svd(rows, full_matrices=False)
        share = directions.S.square().cumsum(0) / directions.S.square().sum()
        principal = directions.Vh[: int((share < ratio).sum()) + 1]
        u, v = _factors(update)
        moved = v.double() - suppression * (principal.t() @ (principal @ v.double()))
        return LowRank(u, moved.float()) if isinstance(update, LowRank) else Dense(u @ moved.float().t())

    return post


def simulated_ideal(ridge: float) -> Post:
    """SimIE: an update does to the keys of all edits what one edit of them all would have done.

    With ``K_t`` the keys of edit ``t`` and ``Δ_t`` its update, the smallest shift that gives every key what its own
    edit gave it solves a linear system; its recursive form (openreview VdEG08ZJCH) replaces ``Δ_t`` by

        Δ_t K_t K_tᵀ (λI + Σ_{s≤t} K_s K_sᵀ)⁻¹

    Args:
        ridge: λ, relative to the mean squared norm of the first edit's keys.
    """

    def post(site: Site, update: Update) -> Update:
        name = f"simie/{site.layer}"
        new, _ = site.keys.each(compact=True)
        if f"{name}/ridge" not in site.state:
            size = float(new.double().square().sum()) / len(site.keys.weight)
            site.state[f"{name}/ridge"] = torch.tensor(ridge * size, dtype=torch.float64)
        append(site.state, f"{name}/keys", new)
        u, v = _factors(update)
        given = u.double() @ (v.double().t() @ new.double())
        solution = kv_solve(gathered(site.state, f"{name}/keys"), given, float(site.state[f"{name}/ridge"]))
        return LowRank(solution.U, solution.V)

    return post


def _factors(update: Update) -> tuple[Tensor, Tensor]:
    if isinstance(update, LowRank):
        return update.U, update.V
    return update.delta, torch.eye(update.delta.shape[1])


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
