"""``kecore report``: one page, tables and figures of what stores hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kecore.api.errors import ConfigError
from kecore.cli import options
from kecore.cli.console import Screen, make_fields
from kecore.cli.plugins import help_group

__all__ = ["report"]

_SHORT = {"md": "markdown", "tex": "latex"}
"""Other names of formats."""


@help_group("Measure")
def report(
    context: typer.Context,
    stores: Annotated[
        list[Path],
        typer.Argument(
            metavar="STORE", help="Files of results by one protocol, or by one under several seeds.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory for the files.", show_default="STORE-report")
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME,NAME",
            help="html, markdown (md), latex, csv, json, png, pdf or svg; all where none is named.",
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            "--columns",
            "--metrics",
            metavar="NAME,NAME",
            help="Scores and costs to show, in this order, such as ES,NS,s/fact; --metrics is the same. "
            "`kecore metrics` lists them.",
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            "--rows",
            "--methods",
            metavar="NAME,NAME",
            help="Runs to show, in this order, by label or method; --methods is the same.",
        ),
    ] = None,
    caption: Annotated[str | None, typer.Option(metavar="TEXT", help="Caption of the LaTeX table, as LaTeX.")] = None,
    label: Annotated[str | None, typer.Option(metavar="NAME", help="Label of the LaTeX table.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Make tables, figures and one HTML page of what stores of results hold.

    The page needs no other file and no network. LaTeX, and Markdown where rows or columns are chosen, is one table of
    all models, data sets and seeds, with the best values marked.
    """
    from contextlib import ExitStack

    from kecore.files import check_writable
    from kecore_bench.report import FIGURES, FORMATS, Choice, Words, write_report
    from kecore_bench.store import Store

    screen = Screen.of(context)
    chosen = [_SHORT.get(name, name) for name in options.names(formats)]
    unknown = sorted(set(chosen) - set(FORMATS))
    if unknown:
        raise ConfigError(f"--format {', '.join(unknown)}: there are {', '.join(FORMATS)}")
    out = out or stores[0].with_name(f"{stores[0].stem}-report")
    check_writable(out)
    choice = Choice(tuple(options.names(columns)), tuple(options.names(rows)))
    words = Words(caption or "", label or "")
    with ExitStack() as stack:
        opened = [stack.enter_context(Store(path)) for path in stores]
        written = write_report(opened, out, chosen or FORMATS, optional=not chosen, choice=choice, words=words)
    if not chosen and not written.keys() & set(FIGURES):
        screen.warn("no figures were written: matplotlib is not installed (pip install 'kecore[plot]')")
    files: dict[str, list[str]] = {}
    for name, paths in written.items():
        files[name] = [str(path) for path in paths]
    screen.show(make_fields({name: ", ".join(paths) for name, paths in files.items()}))
    screen.finish({"out": out, "files": files, "warnings": screen.warnings})
