"""``kecore report``: one page and tables of what a store holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kecore.api.errors import ConfigError
from kecore.cli import options
from kecore.cli.console import Screen, make_fields
from kecore.cli.plugins import help_group

__all__ = ["report"]


@help_group("Measure")
def report(
    context: typer.Context,
    stores: Annotated[
        list[Path], typer.Argument(metavar="STORE", help="Files of results by one protocol.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory for the files.", show_default="STORE-report")
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="NAME,NAME", help="html, markdown, latex, csv, json or png; all where none is named."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Make tables and one HTML page of what a store of results holds.

    The page needs no other file and no network. Several stores make one page if they follow one protocol.
    """
    from contextlib import ExitStack

    from kecore.files import check_writable
    from kecore_bench.report import FORMATS, write_report
    from kecore_bench.store import Store

    screen = Screen.of(context)
    chosen = options.names(formats)
    unknown = sorted(set(chosen) - set(FORMATS))
    if unknown:
        raise ConfigError(f"--format {', '.join(unknown)}: there are {', '.join(FORMATS)}")
    out = out or stores[0].with_name(f"{stores[0].stem}-report")
    check_writable(out)
    with ExitStack() as stack:
        opened = [stack.enter_context(Store(path)) for path in stores]
        written = write_report(opened, out, chosen or FORMATS, optional=not chosen)
    if not chosen and "png" not in written:
        screen.warn("no PNG was written: matplotlib is not installed (pip install 'kecore[plot]')")
    files: dict[str, list[str]] = {}
    for name, paths in written.items():
        files[name] = [str(path) for path in paths]
    screen.show(make_fields({name: ", ".join(paths) for name, paths in files.items()}))
    screen.finish({"out": out, "files": files, "warnings": screen.warnings})
