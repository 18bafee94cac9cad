"""Float32 matrix products of frozen weights by oneDNN, where torch would take MKL.

MKL has no AVX-512 kernels for processors that are not Intel's: on two cores of an AMD EPYC (Zen 5) it was measured at
205 GFLOP/s where oneDNN, which torch carries as well, reaches 458 (``[1050, 576] x [576, 1536]``), and it is four times
slower on a few rows. Where a processor has AVX2 only, MKL's kernels serve it too and are the faster ones (83 GFLOP/s
for 72 on one core of an older EPYC). Both compute in float32. ``benchmarks/bench_onednn.py`` shows it for the machine
it runs on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["products"]

_PLAIN = (Tensor, nn.Parameter)


def products(model: nn.Module) -> AbstractContextManager[Any]:
    """Let oneDNN make a model's products with frozen float32 weights inside the block, where it is the faster one."""
    if not _faster() or _linear() is None:
        return nullcontext()
    on_cpu = any(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())
    return _Products() if on_cpu else nullcontext()


def _faster() -> bool:
    """Return whether oneDNN is faster here, told by the processor's kind and not by a clock.

    The choice decides the last bit of a product, so it must be the same in each run.
    """
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.backends.mkldnn.is_available() and (wide or not torch.backends.mkl.is_available())


def _linear() -> Callable[..., Tensor] | None:
    """Return torch's op for oneDNN's ``x Wᵀ + b``; None where a version of torch has it no more.

    Its name is private: it is what torch's compiler calls.
    """
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Products(TorchFunctionMode):
    """Takes over ``linear`` and ``addmm``, the two products that modules of transformers are made of."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not kwargs:
            if func is functional.linear and _fits(*args):
                operands = args if len(args) == 3 else (*args, None)  # without a bias
                return _Frozen.apply(*operands)
            if func is torch.addmm and len(args) == 3 and _fits(args[1], args[2].t(), args[0]):
                return _Frozen.apply(args[1], args[2].t(), args[0])
        return func(*args, **(kwargs or {}))


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Return whether ``x Wᵀ + b`` is a product for :class:`_Frozen`: in float32 on the CPU, with a frozen ``W, b``."""
    if not _is_plain(x) or x.ndim < 2 or x.numel() == 0:
        return False
    if not _is_plain(weight) or weight.requires_grad:
        return False
    return bias is None or (_is_plain(bias) and not bias.requires_grad and bias.ndim == 1)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in _PLAIN and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


class _Frozen(torch.autograd.Function):
    """``x Wᵀ + b``, differentiable in ``x`` alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return _product(gradient.contiguous(), weight.t(), None), None, None
