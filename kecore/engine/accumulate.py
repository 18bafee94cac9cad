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

__all__ = ["Past", "append", "fold", "gathered"]

_FOLDED = -1
"""The owner of columns that stand for the keys of many subjects."""

_FULL = 1.25  # times as many columns as rows, above which keys are folded: not at every edit of a long sequence


def append(state: dict[str, Tensor], name: str, part: Tensor) -> None:
    """Add a part to a tensor that grows edit by edit along its last dimension.

    Each part stays a tensor of its own, which the states of later edits share: a hundred edits keep their keys once,
    where joined copies would add up to fifty times as much.
    """
    state[f"{name}/{len(_part_names(state, name))}"] = part


def gathered(state: Mapping[str, Tensor], name: str) -> Tensor:
    """Return all parts of a tensor that grew by :func:`append`, side by side."""
    return torch.cat([state[part] for part in _part_names(state, name)], dim=-1)


def fold(state: dict[str, Tensor], name: str) -> None:
    """Replace the parts of keys ``K [d_in, n]`` by a square root of ``K Kᵀ`` once there are a quarter more than rows.

    Where only ``K Kᵀ`` counts, ``[d_in, d_in]`` says all there is to know, however many edits follow.
    """
    names = _part_names(state, name)
    if not names:
        return
    keys = gathered(state, name)
    d_in, columns = keys.shape
    if columns <= _FULL * d_in:
        return
    upper = torch.linalg.qr(keys.double().t(), mode="r").R  # [d_in, d_in]
    for part in names:
        del state[part]
    append(state, name, upper.t().float())


def _part_names(state: Mapping[str, Tensor], name: str) -> list[str]:
    """Return the names of a tensor's parts in the order in which they were appended."""
    parts = [key for key in state if key.startswith(f"{name}/")]
    return [f"{name}/{number}" for number in range(len(parts))]


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
        self.subject_numbers = torch.tensor([_number(subject) for subject in subjects], dtype=torch.long)  # [u]

    def joined(self, weight: float, columns: Tensor, groups: Tensor) -> tuple[float, Tensor]:
        """Return the present edit's keys behind those of the past, which they join.

        Args:
            weight: λ for a first edit. A sequence keeps the λ that it began with: it is one least-squares problem.
            columns: ``[d_in, c]``, the new keys.
            groups: ``[c]``, the group of each.

        Returns:
            λ, and ``[d_in, n_old + c]``.
        """
        self.fold(columns, groups)
        all_columns = torch.cat([*self.take(columns, groups), columns], dim=1)  # [d_in, n_old + c]
        first_weight = self.state.setdefault(f"{self.name}/weight", torch.tensor(weight, dtype=torch.float64))
        return float(first_weight), all_columns

    def fold(self, columns: Tensor, groups: Tensor) -> None:
        """Keep the past as large as it is once it holds twice as many keys as a key has numbers.

        Of earlier keys least squares needs ``K Kᵀ`` alone, so a square root ``S [d_in, d_in]`` of it stands for them.
        Which column was whose is lost in it: a later request about one of their subjects lets go of the direction of
        its new key ``k`` instead, ``S - S a aᵀ / aᵀa`` with ``a = Sᵀk``. That is the Schur complement of ``K Kᵀ``,
        which is what least squares over the other keys comes to where the value at ``k`` is free.

        Args:
            columns: ``[d_in, c]``, the new keys.
            groups: ``[c]``, the group of each.
        """
        state, keys_name, owners_name = self.state, f"{self.name}/keys", f"{self.name}/owner"
        folded_name = f"{self.name}/folded"
        names = _part_names(state, keys_name)
        if names and sum(state[name].shape[1] for name in names) > 2 * len(columns):
            owners = gathered(state, owners_name)
            folded = state.get(folded_name, torch.zeros(0, dtype=torch.long))
            state[folded_name] = torch.cat([folded, owners[owners != _FOLDED]]).unique()
            for name in _part_names(state, owners_name):
                del state[name]
            fold(state, keys_name)
            append(state, owners_name, torch.full((len(columns),), _FOLDED))
        again = torch.isin(self.subject_numbers[groups], state.get(folded_name, torch.zeros(0, dtype=torch.long)))
        if bool(again.any()):
            root = state[f"{keys_name}/0"].double()  # [d_in, d_in]
            basis = torch.linalg.qr(root.t() @ columns[:, again].double()).Q  # [d_in, new keys of folded subjects]
            state[f"{keys_name}/0"] = (root - (root @ basis) @ basis.t()).float()

    def take(self, columns: Tensor, groups: Tensor) -> list[Tensor]:
        """Take in the present edit's keys; the arguments of :meth:`joined`.

        Returns:
            The keys of each earlier edit that are still held, ``[d_in, n_s]``.
        """
        state, keys_name, owners_name = self.state, f"{self.name}/keys", f"{self.name}/owner"
        new_owners = self.subject_numbers[groups]  # [c], the subject of each new key
        earlier_keys: list[Tensor] = []
        for keys, owners in zip(_part_names(state, keys_name), _part_names(state, owners_name), strict=True):
            stays = ~torch.isin(state[owners], new_owners)  # [n_s]
            if not bool(stays.all()):
                state[keys], state[owners] = state[keys][:, stays], state[owners][stays]
            earlier_keys.append(state[keys])
        append(state, keys_name, columns)
        append(state, owners_name, new_owners)
        return earlier_keys


def _number(subject: str) -> int:
    """Return a digest of a subject in 63 bits, which fits an int64."""
    return int.from_bytes(hashlib.sha256(subject.encode()).digest()[:8], "big") >> 1
