"""Options that ``kecore eval``, ``bench`` and ``compare`` have in common: each group is a dataclass, written once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_type_hints

import typer

from kecore.cli import options
from kecore_bench.commands import options as bench_options

__all__ = ["DataOptions", "MethodOptions", "RunOptions", "take_groups"]


@dataclass(frozen=True)
class DataOptions:
    """Options that say how the data sets of ``--facts`` are read."""

    data_format: options.Format = None
    split: options.Split = None
    variant: options.Variant = None
    sha256: options.Checksum = None

    def entry(self, path: str) -> dict[str, str | None]:
        """Return a data set as a plan's ``facts`` take it."""
        return {
            "path": path,
            "format": self.data_format,
            "split": self.split,
            "variant": self.variant,
            "sha256": self.sha256,
        }


@dataclass(frozen=True)
class MethodOptions:
    """Options that name the baselines, and what methods are given beside the facts."""

    without: bench_options.Without = None
    stats: options.Stats = None
    text: options.Texts = None
    tokens: options.Tokens = None
    trained: bench_options.TrainedEditors = None
    examples: options.Examples = None

    def fields(self) -> dict[str, Any]:
        """Return the fields of a plan."""
        return {
            "without": options.names(self.without),
            "stats": self.stats,
            "text": self.text,
            "tokens": self.tokens,
            "trained": self.trained,
            "examples": self.examples,
        }


@dataclass(frozen=True)
class RunOptions:
    """Options that say how scores are taken, and on which device.

    Device and type have no value of their own, so that those of a plan's file stand where none is given.
    """

    protocol: bench_options.ProtocolFields = None
    references: bench_options.References = None
    jobs: bench_options.Jobs = 1
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps, ...", show_default="auto")
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="auto (as stored), float32, bfloat16 or float16.", show_default="auto"),
    ] = None
    memory: options.Memory = "auto"
    trust_remote_code: options.RemoteCode = False

    def fields(self) -> dict[str, Any]:
        """Return the fields of a plan, without those of its protocol."""
        return {
            "references": self.references,
            "device": self.device,
            "dtype": self.dtype,
            "memory": options.byte_count(self.memory),
            "trust_remote_code": self.trust_remote_code or None,
        }


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
