"""Stages by name: ``stages="blue + rect"`` in a method's configuration adds them to whatever the method does.

So does ``"memit + blue + rect"`` in place of a method's name (:meth:`kecore.api.registry.Registry.get`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, ClassVar

from pydantic import Field, field_validator
from typing_extensions import Self

from kecore.api.config import MethodConfig
from kecore.api.errors import ConfigError
from kecore.engine.post import (
    Post,
    besides_principal_directions,
    chained,
    largest_relative_changes,
    restrained_spectrum,
    simulated_ideal,
)
from kecore.engine.target import norm_anchored

__all__ = ["StagedConfig"]


class StagedConfig(MethodConfig):
    """Names of further stages, and their numbers."""

    own_stages: ClassVar[tuple[str, ...]] = ()
    """Stages that make the method what it is; those that a user names come after them."""

    stages: tuple[str, ...] = Field(
        default=(),
        description="Stages beside the method's own, a list or a line such as 'blue + rect': blue edits the first and "
        "last layer, each for values of its own, merge lets requests about one subject share a value, nas gives values "
        "the length that the unedited model's have, rect keeps the largest relative changes, prune restrains the "
        "spectrum, sphere leaves out the weight's principal directions, simie does to all edits' keys what one edit of "
        "them would.",
    )
    nas_anchor: float | None = Field(
        default=None,
        gt=0,
        description="Stage nas: length of a value; None takes the mean length of the values of the session's first "
        "edit, without the longest twentieth.",
    )
    rect_kept: float = Field(
        default=0.4, gt=0, le=1, description="Stage rect: share of an update's entries that stay (RECT's top-k%)."
    )
    prune_base: float = Field(
        default=1.2, gt=1, description="Stage prune: base of the logarithm that large singular values are reduced by."
    )

    sphere_ratio: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Stage sphere: share of the spectrum that is principal (0.5 in EasyEdit's set-ups).",
    )
    sphere_suppression: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Stage sphere: how much of the update along it goes, 1 for all (0.5 in EasyEdit's set-ups).",
    )
    simie_ridge: float = Field(
        default=0.1,
        gt=0,
        description="Stage simie: lambda, relative to the mean squared norm of the first edit's keys.",
    )

    @field_validator("stages", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        if isinstance(given, str):
            given = given.split("+") if given.strip() else ()
        return cls._added(given) if isinstance(given, list | tuple) else given

    @classmethod
    def _added(cls, names: Sequence[Any]) -> tuple[str, ...]:
        """Names of stages as they are known.

        Raises:
            ValueError: there is no such stage, or it is there already.
        """
        every = list(cls.own_stages)
        for name in (str(name).strip().casefold() for name in names):
            if name not in _KNOWN:
                near = get_close_matches(name, _KNOWN, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"no stage {name!r}; {hint}known: {', '.join(_KNOWN)}")
            if name in every:
                owned = " (it is a part of the method)" if name in cls.own_stages else ""
                raise ValueError(f"stage {name!r} is named twice{owned}; name each once")
            every.append(name)
        return tuple(every[len(cls.own_stages) :])

    @classmethod
    def staged(cls, names: Sequence[str]) -> type[Self]:
        """The configuration of the method with further stages of its own; see the base."""
        try:
            own = (*cls.own_stages, *cls._added(names))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        like = {key: getattr(cls, key) for key in ("__doc__", "__module__", "__qualname__")}
        made: Any = type(cls.__name__, (cls,), {**like, "own_stages": own})
        return made

    @property
    def every_stage(self) -> tuple[str, ...]:
        """The method's own stages and then the named ones: the order in which those of one kind act."""
        return (*self.own_stages, *self.stages)

    @property
    def blue(self) -> bool:
        """BLUE (arXiv 2502.03748): the first and the last layer are edited, each for values of its own."""
        return "blue" in self.every_stage

    def boundary(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        """Of these layers the first and the last, if the stage ``blue`` is asked for."""
        return tuple(sorted({layers[0], layers[-1]})) if self.blue else layers

    def engine_stages(self) -> dict[str, Any]:
        """What the stages give to :class:`~kecore.engine.closed_form.ClosedForm`."""
        given: dict[str, Any] = {"post": chained([_POSTS[name](self) for name in self.every_stage if name in _POSTS])}
        given |= {"merge_subjects": True} if "merge" in self.every_stage else {}
        return given | ({"target": norm_anchored(self.nas_anchor)} if "nas" in self.every_stage else {})


_POSTS: dict[str, Callable[[StagedConfig], Post]] = {
    "rect": lambda config: largest_relative_changes(config.rect_kept),
    "prune": lambda config: restrained_spectrum(config.prune_base),
    "sphere": lambda config: besides_principal_directions(config.sphere_ratio, config.sphere_suppression),
    "simie": lambda config: simulated_ideal(config.simie_ridge),
}
_KNOWN = ("blue", "merge", "nas", *_POSTS)
