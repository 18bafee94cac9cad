"""LayerView: one decoder layer as editing methods see it, and the places in it where keys are mapped to values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from kecore.api.errors import UnsupportedModelError
from kecore.model.linear import LinearView
from kecore.model.sites import SiteId

__all__ = ["LayerView", "ValueSite"]


@dataclass(frozen=True, slots=True)
class ValueSite:
    """A place where a key is mapped to a value.

    Args:
        layer: index of the layer.
        expert: index of the expert; None in a layer that has one such place.
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
class LayerView:
    """One decoder layer.

    Args:
        index: position in the stack.
        name: module path.
        module: the layer.
        sites: the places where the layer maps keys to values; a dense layer has one.
        residual_scale: ``c`` where adding ``v`` to a site's output adds ``c v`` to the layer's output; None where
            something (a norm after the block) stands between them.
        items: length of the tuple that the layer returns; 0 where it returns a bare tensor.
    """

    index: int
    name: str
    module: nn.Module
    sites: tuple[ValueSite, ...]
    residual_scale: float | None
    items: int = 0

    @property
    def site(self) -> ValueSite:
        """The one site of a dense layer.

        Raises:
            UnsupportedModelError: the layer has several.
        """
        if len(self.sites) != 1:
            raise UnsupportedModelError(
                f"{self.name} maps keys to values in {len(self.sites)} places, and what was asked for needs a layer "
                "with one; choose a dense layer (`layers`), or a method that edits experts"
            )
        return self.sites[0]
