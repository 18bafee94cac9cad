"""Stages by name: ``stages="blue + rect"`` in a method's configuration adds them to whatever the method does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field, field_validator

from kecore.config import MethodConfig
from kecore.editing.post import (
    Post,
    besides_principal_directions,
    chained,
    largest_relative_changes,
    restrained_spectrum,
    simulated_ideal,
)
from kecore.editing.target import norm_anchored

__all__ = ["StagedConfig"]


class StagedConfig(MethodConfig):
    """Names of further stages, and their numbers."""

    stages: tuple[str, ...] = Field(
        default=(),
        description="Further stages, a list or a line such as 'blue + rect': blue edits the first and last layer, "
        "merge lets requests about one subject share a value, nas gives values the length that the unedited model's "
        "have, rect keeps the largest relative changes, prune restrains the spectrum, sphere leaves out the weight's "
        "principal directions, simie does to all edits' keys what one edit of them would.",
    )
    rect_kept: float = Field(
        default=0.4, gt=0, le=1, description="Stage rect: share of an update's entries that stay (RECT's top-k%)."
    )
    prune_base: float = Field(
        default=1.2, gt=1, description="Stage prune: base of the logarithm that large singular values are reduced by."
    )

    sphere_ratio: float = Field(
        default=0.5, ge=0, le=1, description="Stage sphere: share of the spectrum that is principal (as released)."
    )
    sphere_suppression: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Stage sphere: how much of the update along it goes (as released for AlphaEdit; 0.8 for MEMIT).",
    )
    simie_ridge: float = Field(
        default=0.1,
        gt=0,
        description="Stage simie: lambda, relative to the mean squared norm of the first edit's keys.",
    )

    @field_validator("stages", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        names = [name.strip() for name in given.split("+")] if isinstance(given, str) else given
        unknown = [name for name in names if name not in _KNOWN]
        if unknown:
            raise ValueError(f"no stage {', '.join(map(repr, unknown))}; known: {', '.join(_KNOWN)}")
        return names

    def boundary(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        """BLUE (arXiv 2502.03748): of these layers the first and the last, if the stage is asked for."""
        return tuple(sorted({layers[0], layers[-1]})) if "blue" in self.stages else layers

    def engine_stages(self) -> dict[str, Any]:
        """What the stages give to :class:`~kecore.editing.closed_form.ClosedForm`."""
        given: dict[str, Any] = {"post": chained([_POSTS[name](self) for name in self.stages if name in _POSTS])}
        given |= {"merge_subjects": True} if "merge" in self.stages else {}
        return given | ({"target": norm_anchored} if "nas" in self.stages else {})


_POSTS: dict[str, Callable[[StagedConfig], Post]] = {
    "rect": lambda config: largest_relative_changes(config.rect_kept),
    "prune": lambda config: restrained_spectrum(config.prune_base),
    "sphere": lambda config: besides_principal_directions(config.sphere_ratio, config.sphere_suppression),
    "simie": lambda config: simulated_ideal(config.simie_ridge),
}
_KNOWN = ("blue", "merge", "nas", *_POSTS)
