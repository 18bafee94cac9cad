"""The application: its commands, and what holds for all of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kecore._version import __version__
from kecore.cli.commands import attach, chat, demo, edit, export, info, inspect, probe, stats, train
from kecore.cli.console import Screen
from kecore.cli.errors import report_errors
from kecore_analysis.commands import checkup, trace
from kecore_bench.commands import bench, compare, report
from kecore_bench.commands import eval as evaluation
from kecore_datasets import import_triples as triples

__all__ = ["app", "main"]

_MANY = "--text"


class Group(TyperGroup):
    """Adds one treatment of output, errors, warnings and interrupts to every command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Make the screen before anything can fail."""
        ctx.obj = Screen(as_json="--json" in args)
        return super().parse_args(ctx, one_each(args))

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        with report_errors(ctx.obj):
            return super().invoke(ctx)


app = typer.Typer(
    cls=Group,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    demo.demo,
    edit.edit,
    attach.attach,
    attach.revert,
    export.export,
    inspect.inspect,
    chat.chat,
    stats.stats,
    train.train,
    probe.probe,
    trace.trace,
    checkup.checkup,
    compare.compare,
    bench.bench,
    report.report,
    triples.import_triples,
    info.methods,
    info.doctor,
):
    app.command()(_command)
app.command("eval")(evaluation.evaluate)  # a function of that name would hide Python's


def _print_version(asked: bool) -> None:
    if asked:
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


def one_each(args: list[str]) -> list[str]:
    """``--text a b`` as ``--text a --text b``, so that ``--text *.txt`` works.

    Only texts that are there are taken for further ones: a model that is named after them stays a model.
    """
    spread: list[str] = []
    place = -1  # of the values of the current --text; -1 outside
    for arg in args:
        if arg == _MANY:
            place = 0
        elif place == 0:
            place = 1
        elif place == 1 and _is_text(arg):
            spread.append(_MANY)
        else:
            place = -1
        spread.append(arg)
    return spread


def _is_text(arg: str) -> bool:
    return arg.startswith("hf:") or (Path(arg).is_file() and not arg.endswith(".gguf"))
