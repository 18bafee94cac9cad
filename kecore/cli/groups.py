"""Options that belong together: each group is a dataclass, written once, and commands take it as one parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from kecore.cli import options

if TYPE_CHECKING:
    from kecore.evaluate import RecordSet
    from kecore.evaluate.mapping import FieldMap

__all__ = ["ReadingOptions", "take_groups"]


@dataclass(frozen=True)
class ReadingOptions:
    """Options that say how a source of facts is read; every command that takes facts has them."""

    data_format: options.Format = None
    split: options.Split = None
    variant: options.Variant = None
    sha256: options.Checksum = None
    map_: options.Map = None

    def load(self, source: str | Path, limit: int | None = None) -> RecordSet:
        """Read the records of a source; see :func:`kecore.load_records`."""
        from kecore.evaluate import load_records

        return load_records(
            source,
            limit=limit,
            format=self.data_format,
            split=self.split,
            variant=self.variant,
            sha256=self.sha256,
            mapping=self.field_map,
        )

    @property
    def field_map(self) -> FieldMap | None:
        """What ``--map`` says.

        Raises:
            ConfigError: it is no list of fields and names.
        """
        return options.field_map(self.map_)

    def given(self) -> list[str]:
        """Return the names of the options that were given, as they are written."""
        values = {
            "--format": self.data_format,
            "--split": self.split,
            "--variant": self.variant,
            "--sha256": self.sha256,
            "--map": self.map_,
        }
        return [name for name, value in values.items() if value]


def take_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command whose parameters may be groups into one that takes the options of the groups.

    Typer reads options from a function's signature, one parameter each. The command that is returned has such a
    signature; called by it, the dataclasses are made and ``command`` is called with them.

    Args:
        command: a function with typer's annotations; a parameter whose type is a dataclass stands for its fields.
    """
    groups: dict[str, type[Any]] = {}
    parameters: list[Parameter] = []
    hints = get_type_hints(command, include_extras=True)
    for parameter in signature(command).parameters.values():
        hint = hints[parameter.name]
        if is_dataclass(hint) and isinstance(hint, type):
            groups[parameter.name] = hint
            parameters += _options_of(hint)
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hint))

    @wraps(command)
    def call(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    vars(call)["__signature__"] = Signature(parameters)
    return call


def _options_of(group: type[Any]) -> list[Parameter]:
    """Return the fields of a group as parameters of a function."""
    hints = get_type_hints(group, include_extras=True)
    parameters: list[Parameter] = []
    for field in fields(group):
        default = Parameter.empty if field.default is MISSING else field.default
        annotation = hints[field.name]
        parameters.append(Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
    return parameters
