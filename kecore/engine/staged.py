"""Stages in a configuration: ``stages="blue + rect"`` adds them to whatever the method does.

So does ``"memit + blue + rect"`` in place of a method's name (:class:`kecore.api.line.MethodLine`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import Self

from kecore.api.config import MethodConfig, StageSettings
from kecore.api.errors import ConfigError
from kecore.api.stage import installed_stages, setting_prefix
from kecore.engine.closed_form import ClosedForm

__all__ = ["StagedConfig"]


class StagedConfig(MethodConfig):
    """Names of further stages, and their settings.

    The settings of a stage are given beside the fields of the method, under the stage's name: ``rect_kept``. They are
    checked by the stage's own ``Settings``, so whatever is installed can be set.
    """

    # What is no field belongs to a stage, or is refused below.
    model_config = ConfigDict(extra="allow")

    own_stages: ClassVar[tuple[str, ...]] = ()
    """Stages that make the method what it is; those that a user names come after them."""

    stages: tuple[str, ...] = Field(
        default=(),
        description="Stages beside the method's own, a list or a line such as 'blue + rect'; `kecore methods` lists "
        "those that are installed, with their settings.",
    )
    _line: tuple[str, ...] = PrivateAttr(default=())

    @field_validator("stages", mode="before")
    @classmethod
    def _read_stages(cls, given: Any) -> Any:
        if isinstance(given, str):
            given = given.split("+") if given.strip() else ()
        return _known_names(given, cls.own_stages) if isinstance(given, list | tuple) else given

    @model_validator(mode="after")
    def _read_settings(self) -> Self:
        self._fill_in(self.all_stages)
        return self

    @classmethod
    def known_keys(cls) -> list[str]:
        """Return the fields, and the settings of all stages that are installed."""
        keys = list(cls.model_fields)
        for name, stage in installed_stages().all().items():
            keys += [setting_prefix(name) + field for field in stage.Settings.model_fields]
        return sorted(keys)

    @classmethod
    def check_stages(cls, names: Sequence[str]) -> tuple[str, ...]:
        """Return the names of stages that a line adds to the method, as they are known; see the base."""
        try:
            return _known_names(names, cls.own_stages)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def with_stages(self, names: Sequence[str]) -> Self:
        """Return this configuration with the stages of a line; see the base."""
        line = self.check_stages(names)
        if not line:
            return self
        try:
            _known_names(self.stages, (*self.own_stages, *line))
        except ValueError as error:
            raise ConfigError(f"bad configuration for {type(self).__qualname__}: 'stages': {error}") from None
        config = self.model_copy()
        config._line = line
        config._fill_in(config.all_stages)
        return config

    @property
    def all_stages(self) -> tuple[str, ...]:
        """The method's own stages, then a line's, then those named by the field: the order in which they act."""
        return (*self.own_stages, *self._line, *self.stages)

    def settings_of(self, name: str) -> StageSettings:
        """Return the settings of a stage, its defaults where nothing was given."""
        settings = installed_stages().get(name).Settings
        prefix, given = setting_prefix(name), self.model_extra or {}
        names = [field for field in settings.model_fields if prefix + field in given]
        return settings(**{field: given[prefix + field] for field in names})

    def apply_stages(self, form: ClosedForm) -> ClosedForm:
        """Return a method's form with all stages of this configuration in it."""
        for name in self.all_stages:
            form = self.apply_stage(form, name)
        return form

    def apply_stage(self, form: ClosedForm, name: str) -> ClosedForm:
        """Return a form with one stage in it, with this configuration's settings."""
        return installed_stages().get(name)().apply(form, self.settings_of(name))

    def _fill_in(self, names: Sequence[str]) -> None:
        """Check the settings that were given, and put those of the named stages beside them, with their defaults."""
        extra = self.model_extra
        if extra is not None:  # never None, as the class allows more than its fields
            extra.update(_checked_settings(type(self).__name__, extra, names))


def _known_names(names: Sequence[Any], owned: Sequence[str]) -> tuple[str, ...]:
    """Return names of stages as they are known.

    Raises:
        ValueError: there is no such stage, or it is there already.
    """
    known: list[str] = []
    for given in names:
        name = installed_stages().get(str(given).strip()).name
        if name in owned:
            raise ValueError(f"stage {name!r} is named twice (it is a part of the method); name each once")
        if name in known:
            raise ValueError(f"stage {name!r} is named twice; name each once")
        known.append(name)
    return tuple(known)


def _checked_settings(title: str, given: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the settings that were given and all those of the named stages, as users give them.

    Raises:
        ValidationError: names each key that belongs to no stage, or whose value is out of bounds.
    """
    errors: list[InitErrorDetails] = []
    values: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in given.items():
        stage = installed_stages().owner_of(key)
        if stage is None:
            errors.append(InitErrorDetails(type="extra_forbidden", loc=(key,), input=value))
        else:
            values.setdefault(stage.name, {})[key.removeprefix(setting_prefix(stage.name))] = value
    checked: dict[str, Any] = {}
    for name, fields in values.items():
        prefix = setting_prefix(name)
        try:
            settings = installed_stages().get(name).Settings.model_validate(fields)
        except ValidationError as error:
            errors += [_relocated(prefix, item) for item in error.errors()]
        else:
            checked |= {prefix + field: value for field, value in settings}
    if errors:
        raise ValidationError.from_exception_data(title, errors)
    return checked


def _relocated(prefix: str, item: Any) -> InitErrorDetails:
    """Return an error about a stage's field as one about the key that users give."""
    field, *path_inside = item["loc"]
    problem = PydanticCustomError(item["type"], "{message}", {"message": item["msg"]})
    return InitErrorDetails(type=problem, loc=(f"{prefix}{field}", *path_inside), input=item["input"])
