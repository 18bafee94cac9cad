"""Options that ``kecore bench``, ``compare`` and ``eval`` share beside those of every command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kecore.api.errors import ConfigError
from kecore.cli.options import METHODS_HELP, settings

__all__ = [
    "Jobs",
    "MethodHparams",
    "MethodNames",
    "MethodPresets",
    "MethodSettings",
    "Methods",
    "ProtocolFields",
    "References",
    "StorePath",
    "Track",
    "TrainedEditors",
    "Without",
    "method_entries",
]

StorePath = Annotated[
    Path, typer.Argument(metavar="STORE", help="File of results; made if it is not there.", show_default=False)
]
MethodNames = Annotated[
    str, typer.Option(metavar="NAME,NAME", help=f"Editing methods; {METHODS_HELP}", show_default=False)
]
Methods = Annotated[str | None, typer.Option(metavar="NAME,NAME", help=f"Editing methods; {METHODS_HELP}")]
MethodPresets = Annotated[
    list[str] | None,
    typer.Option("--preset", metavar="METHOD=NAME", help="A published set-up of one of --methods to start from."),
]
MethodHparams = Annotated[
    list[str] | None,
    typer.Option(
        "--hparams",
        metavar="METHOD=FILE",
        help="A hyper-parameter file of EasyEdit or the MEMIT family for one of --methods to start from.",
    ),
]
MethodSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="METHOD.KEY=VALUE",
        help="A field of the configuration of one of --methods, as in `kecore edit`.",
    ),
]
Without = Annotated[
    str | None,
    typer.Option(metavar="NAME,NAME", help="Rows to leave out: unedited, ice, retrieval, ft-m or lora."),
]
ProtocolFields = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="A field of the protocol, such as edits=single; docs/evaluate.md lists them. May be given several times.",
    ),
]
Track = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[:PROJECT]", help="Tell a tracker what is done: trackio, wandb, mlflow or an installed one."
    ),
]
Jobs = Annotated[int, typer.Option(metavar="N", help="Processes that share the work.", min=1)]
TrainedEditors = Annotated[
    list[Path] | None,
    typer.Option(
        "--trained", metavar="PATH", help="An editor trained by `kecore train`; may be given once a method and model."
    ),
]
References = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="CounterFact's attribute_snippets.json, whose texts about the targets consistency needs."
    ),
]


def method_entries(
    methods: Sequence[str],
    presets: Sequence[str] | None,
    pairs: Sequence[str] | None,
    hparams: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Join methods with what ``--preset METHOD=NAME``, ``--hparams METHOD=FILE`` and ``--set METHOD.KEY=VALUE`` say.

    Raises:
        ConfigError: an option names none of the methods, or is said twice.
    """

    def split_method(text: str, separator: str, usage: str) -> tuple[str, str]:
        """Return the method that a value names, and what it says of it."""
        name, _, value = text.partition(separator)
        for method in methods:
            if value and _without_spaces(method) == _without_spaces(name):
                return method, value
        raise ConfigError(f"{usage}, METHOD one of {', '.join(map(repr, methods))} (--methods); got '{text}'")

    fields: dict[str, list[str]] = {method: [] for method in methods}
    for text in pairs or ():
        method, pair = split_method(text, ".", "--set takes METHOD.KEY=VALUE")
        fields[method].append(pair)

    def of_methods(option: str, value: str, texts: Sequence[str] | None) -> dict[str, str]:
        """Return what an option says of each method that it names."""
        of_method: dict[str, str] = {}
        for text in texts or ():
            method, said = split_method(text, "=", f"{option} takes METHOD={value}")
            if method in of_method:
                raise ConfigError(f"{option} of '{method}' is given twice")
            of_method[method] = said
        return of_method

    preset_of = of_methods("--preset", "NAME", presets)
    file_of = of_methods("--hparams", "FILE", hparams)
    entries: list[dict[str, Any]] = []
    for name in methods:
        entry = {"name": name, "preset": preset_of.get(name), "set": settings(fields[name])}
        if name in file_of:
            entry["hparams"] = file_of[name]
        entries.append(entry)
    return entries


def _without_spaces(name: str) -> str:
    """Return a name as names are compared: ``memit+blue`` is ``memit + blue``."""
    return "".join(name.split()).casefold()
