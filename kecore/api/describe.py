"""Describes what may be set: the fields of a configuration with type, default, bounds and meaning."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

__all__ = ["ConfigField", "config_fields"]

_BOUNDS = (("ge", ">= {}"), ("gt", "> {}"), ("le", "<= {}"), ("lt", "< {}"), ("min_length", "at least {}"))


@dataclass(frozen=True, slots=True)
class ConfigField:
    """One field of a configuration.

    Args:
        name: its key, as ``--set`` and Python take it.
        type: what it holds, in words of Python.
        default: its value where nothing is set; ``required`` where there is none.
        bounds: what its values must keep to; empty where there is nothing.
        meaning: what it decides.
    """

    name: str
    type: str
    default: Any
    bounds: str
    meaning: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def config_fields(config: type[BaseModel]) -> list[ConfigField]:
    """Return the fields of a configuration, in the order in which they are declared."""
    fields: list[ConfigField] = []
    for name, info in config.model_fields.items():
        default: Any = "required" if info.is_required() else _default(info)
        fields.append(ConfigField(name, _type_name(info.annotation), default, _bounds(info), info.description or ""))
    return fields


def _default(info: FieldInfo) -> Any:
    default: Any = info.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return None
    return default.model_dump(mode="json") if isinstance(default, BaseModel) else default


def _type_name(annotation: Any) -> str:
    """Write a type as a reader of Python would: ``int``, ``float | None``, ``'a' or 'b'``."""
    if annotation is type(None):
        return "None"
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " or ".join(map(repr, arguments))
    if isinstance(annotation, type) and not arguments:
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("collections.abc.", "")


def _bounds(info: FieldInfo) -> str:
    found: list[str] = []
    for constraint in info.metadata:
        for attribute, text in _BOUNDS:
            value = getattr(constraint, attribute, None)
            if value is not None:
                found.append(text.format(value))
    return ", ".join(found)
