"""The application: its commands, and what holds for all of them."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from kecore._version import __version__
from kecore.cli.commands import (
    attach,
    chat,
    demo,
    edit,
    explain,
    export,
    info,
    inspect,
    new_method,
    probe,
    share,
    stats,
    train,
)
from kecore.cli.plugins import CommandGroup, help_group

__all__ = ["app", "main"]

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS = {
    "Edit facts": (demo.demo, edit.edit, chat.chat, inspect.inspect),
    "Use edits elsewhere": (attach.attach, attach.revert, export.export, share.push, share.pull),
    "Prepare": (stats.stats, train.train, probe.probe),
    "Write a method": (new_method.new_method,),
    "Find your way": (info.methods, info.doctor, explain.explain),
}
for _title, _functions in _COMMANDS.items():
    for _function in _functions:
        app.command()(help_group(_title)(_function))


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"kecore {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Edit facts inside large language models without retraining.

    MODEL is a Hub id, a directory, a .gguf file, or 'demo'. Start with: kecore demo
    """


def main() -> None:
    """Run the command line; what the script ``kecore`` calls."""
    # Threads that wait for each other by spinning starve where other work wants the same cores: with three busy
    # processes on two cores an evaluation took 8 s with this and 80 to 260 s without. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
