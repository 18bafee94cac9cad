"""LayerView: one decoder layer as editing methods see it, and the places in it where keys are mapped to values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from kecore.api.errors import UnsupportedModelError
from kecore.model.experts import ExpertsView
from kecore.model.linear import LinearView, Packed, is_packed, unpacked
from kecore.model.sites import SiteId

__all__ = ["BlockView", "LayerView", "ValueSite"]


@dataclass(frozen=True, slots=True)
class ValueSite:
    """A place where a key is mapped to a value.

    Args:
        layer: index of the layer.
        expert: index of the expert; None in a layer that has one such place. Experts that every token uses (shared
            ones) are counted behind those that tokens are routed to.
        linear: the linear map whose input is the key and whose output enters the residual stream: the last matrix of
            the feed-forward block.
    """

    layer: int
    expert: int | None
    linear: LinearView

    @property
    def id(self) -> SiteId:
        """The site's name."""
        return SiteId(self.layer, self.expert)


@dataclass(frozen=True, slots=True)
class BlockView:
    """The module whose output a layer's feed-forward block adds to the residual stream.

    That is the value projection of a dense layer, and the whole mixture of a layer with experts. It maps a vector of
    each token to a value, so what acts beside it needs to know nothing of what is inside.

    Args:
        module: the module, which is called with states of the tokens first.
        name: module path.
        d_in: width of what it reads.
        d_out: width of what it returns, first if it returns several things.
    """

    module: nn.Module
    name: str
    d_in: int
    d_out: int

    @property
    def device(self) -> torch.device:
        """Where the block's weights are."""
        return next(tensor.device for tensor in (*self.module.parameters(), *self.module.buffers()))

    def weight_size(self) -> float:
        """Return the root mean square of the numbers in the block's matrices: what learning rates are relative to."""
        if is_packed(self.module):
            packed = Packed(self.d_out, self.d_in, torch.get_default_dtype())
            return float(unpacked(self.module, packed).float().square().mean().sqrt())
        matrices = [parameter for parameter in self.module.parameters() if parameter.ndim > 1]
        if len(matrices) == 1:
            return float(matrices[0].data.float().square().mean().sqrt())
        total = sum(float(matrix.data.float().square().sum(dtype=torch.float64)) for matrix in matrices)
        return (total / max(1, sum(matrix.numel() for matrix in matrices))) ** 0.5


@dataclass(frozen=True, slots=True)
class LayerView:
    """One decoder layer.

    Args:
        index: position in the stack.
        name: module path.
        module: the layer.
        block: the module whose output enters the residual stream.
        sites: the places where the layer maps keys to values. A dense layer has one, a layer with experts one for each
            expert; none where what was found inside the block cannot be edited.
        residual_scale: ``c`` where adding ``v`` to the block's output adds ``c v`` to the layer's output; None where
            something (a norm after the block) stands between them.
        items: length of the tuple that the layer returns; 0 where it returns a bare tensor.
        experts: the experts that tokens are routed to, where the layer has such.
        no_sites: why the layer has no sites; empty where it has some.
    """

    index: int
    name: str
    module: nn.Module
    block: BlockView
    sites: tuple[ValueSite, ...]
    residual_scale: float | None
    items: int = 0
    experts: ExpertsView | None = None
    no_sites: str = ""

    @property
    def site(self) -> ValueSite:
        """The one site of a dense layer.

        Raises:
            UnsupportedModelError: the layer has several, or none.
        """
        if len(self.sites) == 1:
            return self.sites[0]
        self.check_sites()
        raise UnsupportedModelError(
            f"{self.name} maps keys to values in {len(self.sites)} places, and what was asked for needs a layer "
            "with one; choose a dense layer (`layers`), a method that edits experts, such as memit, or name one matrix "
            "with ModelView.of(model, value_projection='path.inside.layer')"
        )

    @property
    def is_mixture(self) -> bool:
        """Whether the layer keeps its values in several matrices, of which a token uses some."""
        return self.experts is not None or not self.sites

    def check_sites(self) -> None:
        """Refuse a layer whose matrices cannot be edited.

        Raises:
            UnsupportedModelError: says what was found, and which methods work.
        """
        if not self.sites:
            raise UnsupportedModelError(
                f"{self.name}: {self.no_sites}. Use a method that changes no weights (`kecore methods`), or name a "
                "dense part with ModelView.of(model, value_projection='path.inside.layer')"
            )
