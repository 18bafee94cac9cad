"""A low-rank edit as a LoRA adapter in PEFT's file format, which peft, vLLM and others load beside the base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kecore.api.errors import ConfigError, UnsupportedCapabilityError
from kecore.edit.updates import LowRank, smallest_factors
from kecore.edit.weight import WeightEdit
from kecore.files import write_atomic, write_json
from kecore.model import MatrixName

__all__ = ["CONFIG", "Factors", "factor_edit", "reduced", "served_rank", "write_adapter"]

CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_SERVED = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM may be started with (``--max-lora-rank``)."""


def served_rank(rank: int) -> int | None:
    """Return the least rank that a server must be started with to load an adapter; None where none is large enough."""
    return next((served for served in _SERVED if served >= rank), None)


@dataclass(frozen=True, slots=True)
class Factors:
    """Updates in factors of one rank, as programs that serve adapters want them.

    Args:
        updates: by name of the weight, all of one rank.
        rank: that rank.
        lost: the largest share of an update's Frobenius norm that the rank left out; 0 where it holds all.
    """

    updates: Mapping[str, LowRank]
    rank: int
    lost: float


def factor_edit(edit: WeightEdit, rank: int | None = None) -> Factors:
    """Factor an edit's updates in as few columns as hold them (:func:`~kecore.edit.updates.smallest_factors`).

    All matrices are given the highest rank among them, by columns of zeros: programs that serve adapters know one rank
    only.

    Args:
        edit: its updates must be low-rank, unless ``rank`` is given.
        rank: columns, at the most; what they cannot hold is left out. None for all that the edit holds.

    Raises:
        ConfigError: the rank is below 1.
        UnsupportedCapabilityError: an update is dense and no rank is given, there is none, or it is of an expert.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"the rank of an adapter must be at least 1, got {rank}")
    dense = [name for name, update in edit.updates.items() if not isinstance(update, LowRank)]
    if not edit.updates or (dense and rank is None):
        raise UnsupportedCapabilityError(
            f"an adapter holds low-rank updates, and this edit of '{edit.method}' has "
            f"{f'a full one of {dense[0]}' if dense else 'none'}; write a checkpoint with `kecore attach` or "
            f"--to merged instead{', or the best adapter of a rank with --rank N' if dense else ''}"
        )
    stacked = [name for name in edit.updates if MatrixName.parse(name).index is not None]
    if stacked:
        raise UnsupportedCapabilityError(
            f"an adapter adds to linear modules, and {stacked[0]} is one of several experts' matrices that a parameter "
            "stacks; write a checkpoint with `kecore attach` or --to merged instead"
        )
    updates: dict[str, LowRank] = {}
    lost = 0.0
    for name, update in edit.updates.items():
        updates[name], share = smallest_factors(update, rank)
        lost = max(lost, share)
    highest = max(update.rank for update in updates.values())
    padded = {name: LowRank(_padded(update.U, highest), _padded(update.V, highest)) for name, update in updates.items()}
    return Factors(padded, highest, 0.0 if rank is None else lost)


def reduced(edit: WeightEdit, rank: int) -> WeightEdit:
    """Return what is left of an edit in factors of a lower rank."""
    return replace(edit, updates=dict(factor_edit(edit, rank).updates))


def write_adapter(edit: WeightEdit, factors: Factors, folder: Path, *, base: str = "") -> None:
    """Write an edit as a LoRA adapter in PEFT's format: ``B = U``, ``A = Vᵀ``, scaled by one.

    The adapter does not refuse other base models, as the edit does.

    Args:
        edit: says which parameters the model stores transposed.
        factors: its updates.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` are written.
        base: name of the base model, as programs that load the adapter should find it.

    Raises:
        StorageError: a file cannot be written.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, update in factors.updates.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{key}.lora_A.weight"] = update.V.t().contiguous()
        tensors[f"{key}.lora_B.weight"] = update.U
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": factors.rank,
        "lora_alpha": factors.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": bool(edit.transposed),
        "target_modules": [name.removesuffix(".weight") for name in factors.updates],
    }
    # The configuration last: a folder without one is no adapter.
    write_atomic(folder / _WEIGHTS, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    write_json(folder / CONFIG, config)


def _padded(factor: Tensor, rank: int) -> Tensor:
    """Return ``[d, rank]``: a factor with columns of zeros behind its own."""
    return torch.nn.functional.pad(factor, (0, rank - factor.shape[1]))
