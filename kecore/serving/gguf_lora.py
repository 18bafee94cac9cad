"""A low-rank edit as a LoRA adapter of llama.cpp: a GGUF file that its programs load beside the base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from kecore.edit import LowRank
from kecore.serving.gguf_file import need_gguf
from kecore.serving.gguf_names import TensorNames, interleave

__all__ = ["write_lora"]


def write_lora(
    factors: Mapping[str, LowRank], names: TensorNames, interleaved: Mapping[str, int], out: Path, *, title: str
) -> None:
    """Write factors of updates in the format of llama.cpp's ``convert_lora_to_gguf.py``.

    Args:
        factors: update of each parameter, in ``[d_out, d_in]`` orientation; all of one rank, which the scale is
            divided by.
        names: the tensors of the parameters.
        interleaved: heads whose halves the base model's file interleaves, of the parameters where there are such.
        out: the file.
        title: what the file says that it is.
    """
    gguf = need_gguf()
    writer = gguf.GGUFWriter(out, names.architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(title)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        rank = max(update.rank for update in factors.values())
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))  # the scale is alpha over rank: one
        for parameter, update in factors.items():
            tensor = names.of(parameter)
            rows = interleave(update.U, interleaved.get(parameter, 0))  # [d_out, r]
            writer.add_tensor(f"{tensor}.lora_a", update.V.t().contiguous().to(torch.float32).numpy())  # [r, d_in]
            writer.add_tensor(f"{tensor}.lora_b", rows.contiguous().to(torch.float32).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
