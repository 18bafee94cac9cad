"""The spread stage: which layers share one optimised value, and what each of them writes of it.

A value says what one layer is to give. Where several layers are edited, a spread decides three things: which of them
work together on one value (:meth:`Spread.parts`), for which layer it is optimised (:meth:`Spread.anchor`), and how much
each of them writes of what is missing (:meth:`Spread.share`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from kecore.api.errors import LayerError
from kecore.engine.keys import KeyPass, Keys, Prompts
from kecore.model import ModelView, SiteId

__all__ = ["AnchorResiduals", "Evenly", "Residuals", "Spread"]


class Residuals(Protocol):
    """Reads the layers of one part, in ascending order and under the updates made so far."""

    def read(self, layer: int) -> tuple[Keys, Tensor]:
        """Return the keys of a layer, and what is missing to its values.

        Returns:
            Keys, and ``[u, d_model]`` float32 in units of this layer's value projection.
        """
        ...


class Spread(Protocol):
    """How optimised values become what the single layers write.

    A subclass needs :meth:`share` only: by default all layers form one part, the value is optimised for the last of
    them, and what is missing is measured at that layer's output.

    Where it is measured is a choice of the spread too, and so :meth:`residuals` stands beside the three questions of
    the module's docstring: MEMIT measures at the last layer's output, PMET at its value projection, and MEMIT-FE gives
    each layer a target of its own.
    """

    def parts(self, layers: Sequence[int]) -> Sequence[tuple[int, ...]]:
        """Return groups of layers that share one optimised value, in the order in which they are written.

        A layer that is in no part is not edited. Asked about the layers that it chose, a spread gives the same parts.

        Args:
            layers: layers that may be edited, ascending.

        Returns:
            Groups of ascending layers.
        """
        return [tuple(layers)]

    def anchor(self, part: tuple[int, ...]) -> int:
        """Return the layer that the value of a part is optimised for."""
        return part[-1]

    def residuals(self, prompts: Prompts, part: tuple[int, ...], delta: Tensor) -> Residuals:
        """Begin to read the layers of a part; no layer of it has been written yet.

        Args:
            prompts: the prompts of the batch.
            part: the layers.
            delta: ``[u, d_model]``, what the anchor's value projection is to give in addition.

        Raises:
            LayerError: the anchor is not the last layer; such a spread overrides this method.
        """
        if self.anchor(part) != part[-1]:
            raise LayerError(
                f"{type(self).__name__} optimises values for layer {self.anchor(part)} of {list(part)}; a spread whose "
                "anchor is not the last layer has to override 'residuals'"
            )
        return AnchorResiduals(prompts.view, prompts.begin_pass(part), delta)

    @abstractmethod
    def share(self, site: SiteId, keys: Keys, missing: Tensor, remaining: int) -> Tensor:
        """Return what a site writes.

        Args:
            site: the site.
            keys: its keys.
            missing: ``[u, d_model]``, what is missing now, in units of this site's output.
            remaining: number of layers of the part that are still to be written, this one among them.

        Returns:
            ``[u, d_model]`` in the same units.
        """
        ...


class Evenly(Spread):
    """MEMIT's spread (arXiv 2210.07229, eq. 20): an equal share for each layer still to come."""

    def share(self, site: SiteId, keys: Keys, missing: Tensor, remaining: int) -> Tensor:
        """Return ``missing / remaining``."""
        return missing / remaining


class AnchorResiduals(Residuals):
    """Reads what is missing at the last layer of a part.

    Args:
        view: the model.
        keys: a pass over the layers of the part, before any of them is written.
        delta: ``[u, d_model]``, what the last layer's value projection is to give in addition.
    """

    def __init__(self, view: ModelView, keys: KeyPass, delta: Tensor) -> None:
        self._view, self._keys, self._delta = view, keys, delta

    def read(self, layer: int) -> tuple[Keys, Tensor]:
        """Return the keys of a layer, and what the last one still lacks; see :class:`Residuals`."""
        keys, moved = self._keys.advance(layer)
        missing = self._delta - moved
        scale = self._view.layers[layer].residual_scale
        anchor_scale = self._view.layers[self._keys.layers[-1]].residual_scale
        if scale is None or anchor_scale is None:  # behind a norm a part has one layer, and the units agree
            return keys, missing
        return keys, missing * (anchor_scale / scale)
