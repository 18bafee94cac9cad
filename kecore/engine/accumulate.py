"""The accumulation stage: what the next edit of a sequence must know, so that edits in sequence equal one edit.

Least squares over all requests, ``min λ‖ΔL‖² + Σ_t ‖ΔK_t - V_t‖²`` with ``C = L Lᵀ``, has the same solution whether
it is solved at once or in steps, if step ``t`` holds the keys of the steps before where the weights map them by then:

    Δ_t - Δ_{t-1} = R_t K_tᵀ (λC + Σ_{s<t} K_s K_sᵀ + K_t K_tᵀ)⁻¹,    R_t = V_t - Δ_{t-1} K_t

This is recursive least squares, and the equivalence that arXiv 2605.26670 proves for AlphaEdit and extends to MEMIT.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kecore.model import SiteId

__all__ = ["Past", "append", "gathered"]


def append(state: dict[str, Tensor], name: str, part: Tensor) -> None:
    """Add a part to a tensor that grows edit by edit along its last dimension.

    Each part stays a tensor of its own, which the states of later edits share: a hundred edits keep their keys once,
    where joined copies would add up to fifty times as much.
    """
    state[f"{name}/{len(_parts(state, name))}"] = part


def gathered(state: Mapping[str, Tensor], name: str) -> Tensor:
    """All parts of a tensor that grew by :func:`append`, side by side."""
    return torch.cat([state[key] for key in _parts(state, name)], dim=-1)


def _parts(state: Mapping[str, Tensor], name: str) -> list[str]:
    return [f"{name}/{i}" for i in range(sum(key.startswith(f"{name}/") for key in state))]


class Past:
    """Keys of the edits so far at one site, in a method's state.

    A later request about the same subject takes precedence: the earlier keys of that subject would hold the very
    weights that it wants to change, so they are let go.

    Args:
        state: tensors that survive from one edit to the next; read and written.
        site: which site.
        subjects: subject of each group of the present edit.
    """

    def __init__(self, state: dict[str, Tensor], site: SiteId, subjects: Sequence[str]) -> None:
        self.state, self.name = state, f"past/{site}"
        self.owner = torch.tensor([_number(subject) for subject in subjects], dtype=torch.long)

    def joined(self, weight: float, columns: Tensor, groups: Tensor) -> tuple[float, Tensor]:
        """The present edit's keys behind those of the past, which they join.

        Args:
            weight: λ for a first edit. A sequence keeps the λ that it began with: it is one least-squares problem.
            columns: ``[d_in, c]``, the new keys.
            groups: ``[c]``, the group of each.

        Returns:
            λ, and ``[d_in, n_old + c]``.
        """
        every = torch.cat([*self.take(columns, groups), columns], dim=1)
        weight = float(self.state.setdefault(f"{self.name}/weight", torch.tensor(weight, dtype=torch.float64)))
        return weight, every

    def take(self, columns: Tensor, groups: Tensor) -> list[Tensor]:
        """Take in the present edit's keys; the arguments of :meth:`joined`.

        Returns:
            The keys of each edit before that are still held, ``[d_in, n_s]``.
        """
        owner = self.owner[groups]
        keys, owners = f"{self.name}/keys", f"{self.name}/owner"
        before: list[Tensor] = []
        for own, other in zip(_parts(self.state, keys), _parts(self.state, owners), strict=True):
            kept = ~torch.isin(self.state[other], owner)
            if not bool(kept.all()):
                self.state[own], self.state[other] = self.state[own][:, kept], self.state[other][kept]
            before.append(self.state[own])
        append(self.state, keys, columns)
        append(self.state, owners, owner)
        return before


def _number(subject: str) -> int:
    """A subject as 63 bits."""
    return int.from_bytes(hashlib.sha256(subject.encode()).digest()[:8], "big") >> 1
