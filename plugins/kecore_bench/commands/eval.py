"""``kecore eval``: one model, as it is or with an edit, on one data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kecore.api.errors import ArtifactError
from kecore.cli import options
from kecore.cli.console import Screen
from kecore.cli.groups import ReadingOptions, take_groups
from kecore.cli.plugins import help_group
from kecore.hub import EDIT, artifact_file
from kecore_bench.commands.groups import RunOptions
from kecore_bench.commands.shared import data_entry, make_plan, run_on_screen, show_tables

__all__ = ["evaluate"]


@help_group("Measure")
@take_groups
def evaluate(
    context: typer.Context,
    *,
    model: options.Model,
    facts: Annotated[str, typer.Option(metavar="FILE", help="Facts with their probes.", show_default=False)],
    edit: Annotated[
        Path | None, typer.Option(metavar="PATH", help="An edit made by `kecore edit`, to be put on the model.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(metavar="STORE", help="File of results; nothing is kept without it.")
    ] = None,
    limit: options.Limit = None,
    reading: ReadingOptions,
    run_options: RunOptions,
    as_json: options.AsJson = False,
) -> None:
    """Score a model on a data set, as it is or with an edit.

    With --edit both are scored, and what the edit changed elsewhere is told too. With --store the answers are kept,
    and what is there already is not done again.
    """
    from kecore_bench.plan import BASELINES
    from kecore_bench.ranks import here
    from kecore_bench.store import Store

    screen = Screen.of(context)
    if edit is not None and not artifact_file(edit, EDIT).exists():
        raise ArtifactError(f"--edit {edit}: no such file or directory; make it with `kecore edit`")
    if max(run_options.jobs, here().world) > 1 and store is None:
        raise typer.BadParameter("several processes meet in a store: give --store, or leave out --jobs and torchrun")
    fields = {"models": model, "facts": data_entry(facts, reading), "sizes": limit, "edit": edit, "without": BASELINES}
    plan = make_plan(fields, run_options)
    with Store(":memory:" if store is None else store, plan.protocol) as results:
        cells = run_on_screen(screen, plan, results, run_options)
        show_tables(screen, results, {cell.spec.key for cell in cells})
