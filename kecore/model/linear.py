"""A linear map of a model, always spoken as ``[d_out, d_in]`` whatever the module stores."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kecore.api.errors import UnsupportedModelError

__all__ = ["LinearView", "MatrixName", "Packed", "is_packed", "orientation", "packed_map", "unpacked"]

_PACKED_ERROR = 0.02  # relative; some layouts round what they read as well


@dataclass(frozen=True, slots=True)
class MatrixName:
    """The name of one matrix of a model: of a parameter, or of a slice of one that stacks several matrices.

    In files it is written ``model.layers.5.mlp.down_proj.weight``, or ``model.layers.5.mlp.experts.down_proj[3]``.

    Args:
        parameter: name of the parameter in the model.
        index: which of the matrices that the parameter stacks along its first dimension; None where it is one matrix.
    """

    parameter: str
    index: int | None = None

    def __str__(self) -> str:
        return self.parameter if self.index is None else f"{self.parameter}[{self.index}]"

    @classmethod
    def parse(cls, text: str) -> MatrixName:
        """Read a name as ``str`` writes it."""
        match = _INDEXED.fullmatch(text)
        return cls(text) if match is None else cls(match[1], int(match[2]))

    def of(self, data: Tensor) -> Tensor:
        """Return the matrix, a view of the parameter's data.

        Raises:
            IndexError: the parameter stacks fewer matrices.
        """
        return data if self.index is None else data[self.index]


_INDEXED = re.compile(r"(.+)\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class Packed:
    """What is known of a matrix that a module keeps packed in fewer bits.

    Args:
        d_out: width of what the module returns.
        d_in: width of what it reads.
        dtype: type of what it returns.
    """

    d_out: int
    d_in: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class LinearView:
    """One weight matrix and how to read it.

    Args:
        module: the module that applies the map.
        name: name of the matrix in the model, as :class:`MatrixName` writes it.
        transposed: the matrix is stored ``[d_in, d_out]`` (transformers' ``Conv1D``).
        attribute: name of the parameter in the module.
        packed: of a quantised map its shape and type; None where the parameter holds the matrix itself.
    """

    module: nn.Module
    name: str
    transposed: bool
    attribute: str = "weight"
    packed: Packed | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The stored parameter; of an expert, the one that holds the matrices of all of them.

        Raises:
            UnsupportedModelError: the matrix is packed, so it cannot be overwritten.
        """
        if self.packed is not None:
            raise UnsupportedModelError(
                f"{self.name} is quantised ({type(self.module).__name__}), and what was asked for overwrites that "
                "matrix; choose a method that does not, or load the model in its original type"
            )
        weight = getattr(self.module, self.attribute)
        if not isinstance(weight, nn.Parameter):  # guaranteed by the probe
            raise TypeError(f"{self.name} is no longer a parameter")
        return weight

    @property
    def matrix_name(self) -> MatrixName:
        """Name of the parameter, and which of its matrices this is."""
        return MatrixName.parse(self.name)

    @property
    def weight(self) -> Tensor:
        """The weight as ``[d_out, d_in]``, a view of the parameter's data; of a packed one a copy, made anew."""
        if self.packed is not None:
            return unpacked(self.module, self.packed)
        data = self.matrix_name.of(self.parameter.data)
        return data.t() if self.transposed else data

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weight; of a packed one the type of what it returns."""
        return self.parameter.dtype if self.packed is None else self.packed.dtype

    @property
    def d_in(self) -> int:
        """Width of the keys."""
        return self.packed.d_in if self.packed is not None else int(self.weight.shape[1])

    @property
    def d_out(self) -> int:
        """Width of the values."""
        return self.packed.d_out if self.packed is not None else int(self.weight.shape[0])


def is_packed(module: nn.Module) -> bool:
    """Return whether a module without children keeps a table of whole numbers, as every layout of quantisation does."""
    if isinstance(module, nn.Embedding) or next(module.children(), None) is not None:
        return False
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return False
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(tensor.ndim > 1 and not tensor.is_floating_point() for tensor in tensors)


@torch.no_grad()
def unpacked(module: nn.Module, packed: Packed) -> Tensor:
    """Return the matrix of a quantised map, ``[d_out, d_in]``: what the module makes of each unit vector.

    So any layout is read by the module's own code, one matrix at a time, and nothing of the model is unpacked for good.
    What acts beside the module has no part in it.
    """
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    units = torch.eye(packed.d_in, dtype=packed.dtype, device=device)  # [d_in, d_in]
    bias = module.forward(torch.zeros_like(units[:1]))  # [1, d_out]
    return (module.forward(units) - bias).t()


def packed_map(module: nn.Module, x: Tensor, y: Tensor) -> Packed | None:
    """Return what is known of a quantised module that mapped ``x`` to ``y``, if it is a linear map; None if not.

    Args:
        module: any module.
        x: ``[..., d_in]``, an input the module was called with.
        y: ``[..., d_out]``, what it returned.
    """
    if not is_packed(module) or not y.is_floating_point():
        return None
    packed = Packed(int(y.shape[-1]), int(x.shape[-1]), y.dtype)
    matrix = unpacked(module, packed).float()
    bias = module.forward(torch.zeros_like(x.reshape(-1, packed.d_in)[:1])).float()  # [1, d_out]
    expected = x.float().reshape(-1, packed.d_in) @ matrix.t() + bias  # [tokens, d_out]
    error = float((expected - y.float().reshape(-1, packed.d_out)).norm())
    return packed if error <= _PACKED_ERROR * float(y.float().norm()) else None


def orientation(module: nn.Module, x: Tensor, y: Tensor) -> bool | None:
    """Return how a module that mapped ``x`` to ``y`` stores its weight, found by recomputing ``y``.

    Shapes alone cannot tell for square weights.

    Args:
        module: any module with a two-dimensional ``weight``.
        x: ``[..., d_in]``, an input the module was called with.
        y: ``[..., d_out]``, what it returned.

    Returns:
        False for ``y = x Wᵀ + b``, True for ``y = x W + b``, None for neither.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        return None
    bias, eps = getattr(module, "bias", None), torch.finfo(y.dtype).eps
    x, y, w = x.float(), y.float(), weight.detach().float()
    shift = bias.detach().float() if isinstance(bias, Tensor) else 0.0
    # Rounding of the output, or of products where TF32 is on.
    least, best = max(2e-3, 4 * eps) * float(y.norm()), None
    for transposed, matrix in ((True, w), (False, w.t())):
        if x.shape[-1] == matrix.shape[0] and y.shape[-1] == matrix.shape[1]:
            error = float((x @ matrix + shift - y).norm())
            if error <= least:
                least, best = error, transposed
    return best
