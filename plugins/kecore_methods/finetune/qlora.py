"""QLoRA: low-rank adapters trained over a base whose weights have four bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from kecore.api.errors import MissingDependencyError
from kecore.api.method import MethodContext
from kecore.api.progress import quiet_logger
from kecore.api.types import Capabilities
from kecore.batch import RequestBatch
from kecore.edit import WeightEdit
from kecore.engine.layers import linear_maps
from kecore.memory import Need
from kecore.model import LinearView, ModelView
from kecore_methods import hparams
from kecore_methods.finetune.adapter import (
    AdapterConfig,
    AdapterTraining,
    plan_adapter,
)
from kecore_methods.hparams import HparamsTable
from kecore_methods.presets import Published

__all__ = ["QLora", "QLoraConfig", "bitsandbytes_package", "quantised"]

_FLAG = "is_loaded_in_4bit"  # by which peft tells such a base


class QLoraConfig(Published, AdapterConfig):
    """Configuration of QLoRA: the base as in the paper, the adapter a plain LoRA."""

    preset_file: ClassVar[str] = "qlora"
    hparams_table: ClassVar[HparamsTable | None] = hparams.QLORA

    code: Literal["nf4", "fp4"] = Field(
        default="nf4", description="The sixteen values of a weight: those of a normal distribution, or floats."
    )
    block: Literal[32, 64, 128, 256, 512, 1024] = Field(
        default=64, description="Weights that share a scale; a matrix whose rows are not whole blocks stays as it is."
    )
    double_quantisation: bool = Field(default=True, description="The scales are kept in 8 bits.")

    def check_installed(self) -> None:
        """Load the packages peft and bitsandbytes.

        Raises:
            MissingDependencyError: one of them is not installed.
        """
        super().check_installed()
        bitsandbytes_package()

    def needs(self, view: ModelView, batch: RequestBatch) -> list[Need]:
        """Return the memory that LoRA needs, and that of the base in four bits beside the weights themselves."""
        (need,) = super().needs(view, batch)
        weights = sum(linear.d_in * linear.d_out for linear in _quantisable_maps(view, self.block).values())
        bytes_per_scale = 1 if self.double_quantisation else 4
        scales = weights // self.block * bytes_per_scale
        parts = {**need.parts, "base in 4 bits": weights // 2 + scales}
        return [replace(need, parts=parts)]


class QLoraTraining(AdapterTraining):
    """LoRA over the model as it would be with 4-bit weights.

    Args:
        config: the configuration.
    """

    def __init__(self, config: QLoraConfig) -> None:
        super().__init__(config)
        self.qlora = config

    def base(self, view: ModelView) -> AbstractContextManager[Any]:
        """Return a context in which the decoder's linear maps run on 4-bit copies."""
        return quantised(view, self.qlora.code, self.qlora.block, double=self.qlora.double_quantisation)


class QLora:
    """QLoRA: what LoRA does, over the model as it would be with 4-bit weights."""

    name = "qlora"
    Config = QLoraConfig
    capabilities = Capabilities(kind="weights", batch=True, sequential=True, needs_subject=False)
    reference = "Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, NeurIPS 2023, arXiv:2305.14314"
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> WeightEdit:
        """Train an adapter on all requests; the model is bitwise as before when this returns."""
        return plan_adapter(view, batch, context, self.name, QLoraTraining(context.config))


def bitsandbytes_package() -> Any:
    """Import and return the package ``bitsandbytes``.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        with quiet_logger("bitsandbytes"):  # it recommends a further package at import
            import bitsandbytes
    except ImportError as error:
        raise MissingDependencyError(
            f"4-bit weights are made by the package bitsandbytes, which cannot be imported ({error}): "
            "pip install 'kecore[qlora]'"
        ) from error
    return bitsandbytes


@contextmanager
def quantised(view: ModelView, code: str = "nf4", block: int = 64, *, double: bool = True) -> Iterator[None]:
    """Let the linear maps of the decoder layers run on 4-bit copies of their weights inside a ``with`` block.

    The modules themselves are set aside, with their weights untouched, and put back on exit. Matrices whose rows are
    not whole blocks are left out: on a CPU, bitsandbytes 0.50 unpacks them with wrong scales.

    Args:
        view: the model, frozen by the caller.
        code: ``nf4`` (section 3 of the paper, eq. 4) or ``fp4``.
        block: weights that share a scale.
        double: keep the scales in 8 bits (section 3, double quantisation).
    """
    bnb = bitsandbytes_package()
    model = view.model
    maps = _quantisable_maps(view, block)
    options = {"quant_type": code, "blocksize": block, "compress_statistics": double}
    try:
        for path, linear in maps.items():
            _replace_module(model, path, _make_four_bit(bnb, linear, options))
        setattr(model, _FLAG, True)
        yield
    finally:
        if _FLAG in model.__dict__:
            delattr(model, _FLAG)
        for path, linear in maps.items():
            _replace_module(model, path, linear.module)


def _quantisable_maps(view: ModelView, block: int) -> dict[str, LinearView]:
    """Return the linear maps of the decoder layers whose rows are whole blocks, by module path.

    What the architecture says has to be computed in float32 stays as it is: its code reads the type of that weight.
    """
    maps = linear_maps(view, range(len(view.layers)))
    in_float32 = set(getattr(view.model, "_keep_in_fp32_modules", None) or ())
    quantisable: dict[str, LinearView] = {}
    for path, linear in maps.items():
        if linear.d_in % block == 0 and in_float32.isdisjoint(path.split(".")):
            quantisable[path] = linear
    return quantisable


def _make_four_bit(bnb: Any, linear: LinearView, options: dict[str, Any]) -> nn.Module:
    """Return a linear map with a 4-bit copy of another one's weight."""
    weight, bias = linear.weight, linear.module.bias
    four_bit = bnb.nn.Linear4bit(
        linear.d_in,
        linear.d_out,
        bias=False,
        compute_dtype=weight.dtype,
        quant_type=options["quant_type"],
        compress_statistics=options["compress_statistics"],
        device="meta",
    )
    copy = bnb.nn.Params4bit(weight.detach().clone(), requires_grad=False, module=four_bit, **options)
    four_bit.weight = copy.to(weight.device)  # the move to a device quantises it
    if isinstance(bias, Tensor):
        four_bit.bias = nn.Parameter(bias.detach(), requires_grad=False)
    # In evaluation mode some processors would pack the weight anew, for a product that has no gradient.
    return four_bit.train()


def _replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
