"""A low-rank edit as a LoRA adapter in PEFT's file format, which peft, vLLM and others load beside the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kecore.api.errors import UnsupportedCapabilityError
from kecore.edit.updates import LowRank
from kecore.edit.weight import WeightEdit
from kecore.files import write_atomic, write_json

__all__ = ["CONFIG", "export_adapter"]

CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


def export_adapter(edit: WeightEdit, folder: str | Path, *, base: str = "") -> Path:
    """Write an edit as a LoRA adapter: ``B = U``, ``A = Vᵀ``, scaled by one.

    All matrices are given the highest rank among them, by rows and columns of zeros: programs that serve adapters
    know one rank only. The adapter does not refuse other base models, as the edit does.

    Args:
        edit: its updates must be low-rank.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` are written.
        base: name of the base model, as programs that load the adapter should find it.

    Returns:
        The folder.

    Raises:
        UnsupportedCapabilityError: an update is dense, or there is none.
        StorageError: a file cannot be written.
    """
    from safetensors.torch import save_file

    factors = {name: update for name, update in edit.updates.items() if isinstance(update, LowRank)}
    if not factors or len(factors) < len(edit.updates):
        dense = [name for name in edit.updates if name not in factors]
        raise UnsupportedCapabilityError(
            f"an adapter holds low-rank updates, and this edit of '{edit.method}' has "
            f"{f'a full one of {dense[0]}' if dense else 'none'}; write a checkpoint with `kecore attach` instead"
        )
    rank = max(update.rank for update in factors.values())
    tensors: dict[str, Tensor] = {}
    for name, update in factors.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{key}.lora_A.weight"] = _padded(update.V, rank).t().contiguous()
        tensors[f"{key}.lora_B.weight"] = _padded(update.U, rank)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": bool(edit.transposed),
        "target_modules": [name.removesuffix(".weight") for name in factors],
    }
    folder = Path(folder)
    # The configuration last: a folder without one is no adapter.
    write_atomic(folder / _WEIGHTS, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    write_json(folder / CONFIG, config)
    return folder


def _padded(factor: Tensor, rank: int) -> Tensor:
    """Return ``[d, rank]``: a factor with columns of zeros behind its own."""
    return torch.nn.functional.pad(factor, (0, rank - factor.shape[1]))
