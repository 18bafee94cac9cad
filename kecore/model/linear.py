"""A linear map of a model, always spoken as ``[d_out, d_in]`` whatever the module stores."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["LinearView", "MatrixName", "orientation"]


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
class LinearView:
    """One weight matrix and how to read it.

    Args:
        module: the module that applies the map.
        name: name of the matrix in the model, as :class:`MatrixName` writes it.
        transposed: the matrix is stored ``[d_in, d_out]`` (transformers' ``Conv1D``).
        attribute: name of the parameter in the module.
    """

    module: nn.Module
    name: str
    transposed: bool
    attribute: str = "weight"

    @property
    def parameter(self) -> nn.Parameter:
        """The stored parameter; of an expert, the one that holds the matrices of all of them."""
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
        """The weight as ``[d_out, d_in]``, a view of the parameter's data."""
        data = self.matrix_name.of(self.parameter.data)
        return data.t() if self.transposed else data

    @property
    def d_in(self) -> int:
        """Width of the keys."""
        return int(self.weight.shape[1])

    @property
    def d_out(self) -> int:
        """Width of the values."""
        return int(self.weight.shape[0])


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
