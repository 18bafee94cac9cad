"""GGUF files: what one says about its model, and a copy of it in which some matrices are others.

The ``gguf`` package of llama.cpp reads and writes them. It comes with the extra ``kecore[gguf]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kecore.api.errors import ArtifactError, ConfigError, MissingDependencyError, UnsupportedCapabilityError

__all__ = ["TENSOR_TYPES", "GgufFile", "Packed", "copy_with_tensors", "default_type", "need_gguf", "pack"]

TENSOR_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""Types that the gguf package can write a matrix in, from the most exact to the smallest."""

_FLOATS = ("f32", "f16", "bf16")


def need_gguf() -> Any:
    """Return the gguf package.

    Raises:
        MissingDependencyError: it is not installed.
    """
    if find_spec("gguf") is None:
        raise MissingDependencyError("GGUF files are read and written by the gguf package: pip install 'kecore[gguf]'")
    import gguf

    return gguf


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix as it is stored in a GGUF file.

    Args:
        data: its bytes, as the gguf package holds them (a numpy array).
        type_name: its type, of :data:`TENSOR_TYPES`.
        rounding: Frobenius norm of what the type could not hold.
    """

    data: Any
    type_name: str
    rounding: float


@dataclass(frozen=True)
class GgufFile:
    """A model as a GGUF file, memory-mapped.

    Args:
        path: the file.
    """

    path: Path

    @cached_property
    def reader(self) -> Any:
        """The gguf package's reader.

        Raises:
            MissingDependencyError: that package is not installed.
            ArtifactError: there is no such file, or it is no GGUF file, or one of several.
        """
        gguf = need_gguf()
        if not self.path.is_file():
            raise ArtifactError(f"{self.path}: no such file; expected the base model as a GGUF file")
        try:
            reader = gguf.GGUFReader(self.path)
        except Exception as error:  # the reader says by whatever error numpy raises that a file is broken
            raise ArtifactError(f"{self.path} is truncated or no GGUF file ({error})") from error
        parts = reader.get_field("split.count")
        if parts is not None and parts.contents() > 1:
            raise ArtifactError(
                f"{self.path} is one of {parts.contents()} files of a model; join them first by "
                "`llama-gguf-split --merge`"
            )
        return reader

    def value(self, key: str) -> Any:
        """Return a value of the metadata; None where there is none of that key."""
        field = self.reader.get_field(key)
        return None if field is None else field.contents()

    @property
    def architecture(self) -> str:
        """The architecture, as llama.cpp names it."""
        return str(self.value("general.architecture"))

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """The gguf package's tensors, by name."""
        return {tensor.name: tensor for tensor in self.reader.tensors}

    def type_of(self, name: str) -> str:
        """Return the name of a tensor's type, in small letters."""
        return str(self.tensors[name].tensor_type.name).lower()

    def matrix(self, name: str) -> Tensor:
        """Return a tensor as a matrix ``[d_out, d_in]`` float32.

        Raises:
            UnsupportedCapabilityError: the gguf package cannot unpack its type.
        """
        gguf, tensor = need_gguf(), self.tensors[name]
        try:
            unpacked = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UnsupportedCapabilityError(f"{self.path}: {name} is {self.type_of(name)}, {error}") from error
        return torch.from_numpy(unpacked.astype("float32"))


def default_type(base_type: str) -> str:
    """Return the type that an edited matrix is written in: the base's own where it rounds little, else ``f16``.

    Requantised in few bits, a matrix would lose most of what an edit adds: the rounding is larger than the update.
    """
    return base_type if base_type in _FLOATS else "f16"


def pack(matrix: Tensor, type_name: str) -> Packed:
    """Store a matrix in a type of GGUF.

    Args:
        matrix: ``[d_out, d_in]`` float32.
        type_name: one of :data:`TENSOR_TYPES`.

    Raises:
        ConfigError: the type is unknown, or its blocks do not divide the rows.
    """
    gguf = need_gguf()
    if type_name not in TENSOR_TYPES:
        raise ConfigError(f"unknown GGUF type '{type_name}'; expected one of {', '.join(TENSOR_TYPES)}")
    kind = gguf.GGMLQuantizationType[type_name.upper()]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if matrix.shape[1] % block:
        raise ConfigError(
            f"{type_name} packs {block} numbers together, which does not divide rows of {matrix.shape[1]}; choose f16"
        )
    plain = matrix.contiguous().cpu().numpy()
    data = gguf.quantize(plain, kind)
    rounding = torch.from_numpy(gguf.dequantize(data, kind).astype("float32")) - matrix
    return Packed(data, type_name, float(rounding.double().norm()))


def copy_with_tensors(base: GgufFile, replaced: Mapping[str, Packed], out: Path) -> None:
    """Copy a GGUF file with some of its matrices replaced; all metadata and all other tensors stay byte for byte.

    Args:
        base: the file.
        replaced: matrices by the name of the tensor that they take the place of.
        out: where the copy is written.
    """
    gguf, reader = need_gguf(), base.reader
    writer = gguf.GGUFWriter(out, base.architecture, endianess=reader.endianess)
    writer.data_alignment = reader.alignment
    try:
        _copy_metadata(reader, writer)
        for tensor in reader.tensors:
            data, kind = tensor.data, tensor.tensor_type
            if tensor.name in replaced:
                packed = replaced[tensor.name]
                data, kind = packed.data, gguf.GGMLQuantizationType[packed.type_name.upper()]
            writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:  # one at a time: a model may be larger than the memory
            if tensor.name in replaced:
                writer.write_tensor_data(replaced[tensor.name].data)
            else:
                writer.write_tensor_data(tensor.data, tensor_endianess=reader.endianess)
    finally:
        writer.close()


def _copy_metadata(reader: Any, writer: Any) -> None:
    """Copy all keys and values; the writer itself writes the version, the counts and the architecture."""
    gguf = need_gguf()
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == gguf.Keys.General.ARCHITECTURE:
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=element)
