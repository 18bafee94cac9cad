"""Where the parameters of a transformers model stand in a GGUF file: under which name, and in which order of rows.

Names come from the gguf package's own maps. The order of rows is found by comparing numbers: llama.cpp keeps the
queries and keys of some models interleaved for its rotary embedding, and no map says of which.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kecore.api.errors import ArtifactMismatchError, UnsupportedCapabilityError
from kecore.serving.gguf_file import GgufFile, need_gguf

__all__ = ["TensorNames", "architecture_of", "find_interleaving", "interleave"]

_NEAR = 0.5  # relative distance: two bits a number leave 0.3, and other weights are at 1.4

_LAYER = re.compile(r"\.(\d+)\.")


def architecture_of(model_type: str) -> str:
    """Return llama.cpp's name of a transformers model type.

    Raises:
        UnsupportedCapabilityError: the gguf package knows no such architecture.
    """
    names: dict[str, str] = {_bare(name): name for name in need_gguf().MODEL_ARCH_NAMES.values()}
    if _bare(model_type) not in names:
        raise UnsupportedCapabilityError(
            f"the gguf package knows no architecture called '{model_type}'; give the base model as llama.cpp has it by "
            "--base-gguf FILE, and its architecture is taken"
        )
    return names[_bare(model_type)]


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


class TensorNames:
    """The tensors of a GGUF file for parameters of a transformers model.

    Args:
        architecture: as llama.cpp names it.
        parameters: names of the parameters that will be asked for.

    Raises:
        UnsupportedCapabilityError: the gguf package does not know the architecture.
    """

    def __init__(self, architecture: str, parameters: Iterable[str]) -> None:
        gguf = need_gguf()
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        if architecture not in kinds:
            raise UnsupportedCapabilityError(
                f"the installed gguf package does not know the architecture '{architecture}'; a newer one may: "
                "pip install -U gguf"
            )
        self.architecture = architecture
        layers = [int(index) for name in parameters for index in _LAYER.findall(name)]
        self._map: Any = gguf.get_tensor_name_map(kinds[architecture], 1 + max(layers, default=0))

    def of(self, parameter: str) -> str:
        """Return the name of a parameter's tensor.

        Raises:
            UnsupportedCapabilityError: the architecture has no such tensor.
        """
        name = self._map.get_name(parameter, try_suffixes=(".weight",))
        if name is None:
            raise UnsupportedCapabilityError(
                f"llama.cpp's '{self.architecture}' has no tensor of its own for {parameter}, which the edit changes; "
                "serve the edit by --to merged or --to peft"
            )
        return str(name)

    def may_be_interleaved(self, parameter: str) -> bool:
        """Return whether a parameter is of queries or keys, whose rows llama.cpp may order in its own way."""
        kinds = need_gguf().MODEL_TENSOR
        kind = self._map.get_type(parameter, try_suffixes=(".weight",))
        return kind in (kinds.ATTN_Q, kinds.ATTN_K, kinds.ATTN_QKV)


def find_interleaving(base: GgufFile, tensor: str, weight: Tensor, parameter: str) -> int:
    """Find how the rows of a matrix are ordered in a GGUF file of the same model.

    Args:
        base: the file.
        tensor: the tensor's name in it.
        weight: the parameter, ``[d_out, d_in]`` float32.
        parameter: its name, for errors.

    Returns:
        The number of heads whose halves are interleaved; 0 where rows stand as transformers has them.

    Raises:
        ArtifactMismatchError: the file is of another model.
    """
    if tensor not in base.tensors:
        raise ArtifactMismatchError(f"{base.path} has no tensor {tensor} for {parameter}; it is of another model")
    stored = base.matrix(tensor)
    if stored.shape != weight.shape:
        raise ArtifactMismatchError(
            f"{base.path}: {tensor} is {tuple(stored.shape)}, the model's {parameter} is {tuple(weight.shape)}"
        )
    attention = f"{base.architecture}.attention"
    counts = [0, base.value(f"{attention}.head_count"), base.value(f"{attention}.head_count_kv")]
    for count in dict.fromkeys(counts):
        if not isinstance(count, int) or (count and len(weight) % (2 * count)):
            continue
        distance = float((interleave(weight, count) - stored).norm() / weight.norm())
        if distance < _NEAR:
            return count
    raise ArtifactMismatchError(
        f"{base.path} holds other weights than the model that the edit was made for ({tensor} differs from "
        f"{parameter}); give the GGUF file of that model"
    )


def interleave(matrix: Tensor, heads: int) -> Tensor:
    """Return a matrix ``[d_out, ...]`` with its rows as a GGUF file has them.

    Args:
        matrix: with its rows as transformers has them.
        heads: what :func:`find_interleaving` returned.
    """
    if not heads:
        return matrix
    halves = matrix.unflatten(0, (heads, 2, -1))  # [heads, 2, d_head / 2, ...]
    return torch.transpose(halves, 1, 2).reshape(matrix.shape)
