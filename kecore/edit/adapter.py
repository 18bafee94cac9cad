"""A low-rank edit as a LoRA adapter in PEFT's file format, which peft, vLLM and others load beside the base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kecore.api.errors import ConfigError, UnsupportedCapabilityError
from kecore.edit.updates import LowRank, smallest_factors
from kecore.edit.weight import WeightEdit
from kecore.files import write_atomic, write_json

__all__ = ["CONFIG", "Adapter", "export_adapter", "served_rank"]

CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_SERVED = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM may be started with (``--max-lora-rank``)."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that was written.

    Args:
        folder: where it is.
        rank: columns of its factors.
        matrices: names of the weights it changes.
        lost: the largest share of an update's Frobenius norm that its rank left out; 0 where it holds all.
    """

    folder: Path
    rank: int
    matrices: tuple[str, ...]
    lost: float


def served_rank(rank: int) -> int | None:
    """Return the least rank that a server must be started with to load an adapter; None where none is large enough."""
    return next((served for served in _SERVED if served >= rank), None)


def export_adapter(edit: WeightEdit, folder: str | Path, *, base: str = "", rank: int | None = None) -> Adapter:
    """Write an edit as a LoRA adapter: ``B = U``, ``A = Vᵀ``, scaled by one.

    Updates are factored anew in as few columns as hold them (:func:`~kecore.edit.updates.smallest_factors`). All
    matrices are given the highest rank among them, by rows and columns of zeros: programs that serve adapters know one
    rank only. The adapter does not refuse other base models, as the edit does.

    Args:
        edit: its updates must be low-rank, unless ``rank`` is given.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` are written.
        base: name of the base model, as programs that load the adapter should find it.
        rank: columns, at the most; what they cannot hold is left out. None for all that the edit holds.

    Returns:
        What was written.

    Raises:
        ConfigError: the rank is below 1.
        UnsupportedCapabilityError: an update is dense and no rank is given, or there is none.
        StorageError: a file cannot be written.
    """
    from safetensors.torch import save_file

    if rank is not None and rank < 1:
        raise ConfigError(f"the rank of an adapter must be at least 1, got {rank}")
    dense = [name for name, update in edit.updates.items() if not isinstance(update, LowRank)]
    if not edit.updates or (dense and rank is None):
        raise UnsupportedCapabilityError(
            f"an adapter holds low-rank updates, and this edit of '{edit.method}' has "
            f"{f'a full one of {dense[0]}' if dense else 'none'}; write a checkpoint with `kecore attach` instead"
            f"{', or the best adapter of a rank with --rank N' if dense else ''}"
        )
    factors: dict[str, LowRank] = {}
    lost = 0.0
    for name, update in edit.updates.items():
        factors[name], share = smallest_factors(update, rank)
        lost = max(lost, share)
    highest = max(update.rank for update in factors.values())
    tensors: dict[str, Tensor] = {}
    for name, update in factors.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{key}.lora_A.weight"] = _padded(update.V, highest).t().contiguous()
        tensors[f"{key}.lora_B.weight"] = _padded(update.U, highest)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": highest,
        "lora_alpha": highest,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": bool(edit.transposed),
        "target_modules": [name.removesuffix(".weight") for name in factors],
    }
    folder = Path(folder)
    # The configuration last: a folder without one is no adapter.
    write_atomic(folder / _WEIGHTS, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    write_json(folder / CONFIG, config)
    return Adapter(folder, highest, tuple(factors), lost if rank is not None else 0.0)


def _padded(factor: Tensor, rank: int) -> Tensor:
    """Return ``[d, rank]``: a factor with columns of zeros behind its own."""
    return torch.nn.functional.pad(factor, (0, rank - factor.shape[1]))
