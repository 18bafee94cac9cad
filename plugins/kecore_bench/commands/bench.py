"""``kecore bench``: methods x models x data sets x sizes into a store that survives a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kecore.cli import options
from kecore.cli.console import Screen
from kecore.cli.groups import ReadingOptions, take_groups
from kecore.cli.plugins import help_group
from kecore_bench.commands import options as bench_options
from kecore_bench.commands.groups import MethodOptions, RunOptions
from kecore_bench.commands.shared import data_entry, make_plan, run_on_screen, show_tables

__all__ = ["bench"]


@help_group("Measure")
@take_groups
def bench(
    context: typer.Context,
    *,
    store: bench_options.StorePath,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A YAML file with the fields of a plan; options go before it.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="A model; may be given several times.")
    ] = None,
    methods: bench_options.Methods = None,
    facts: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="A data set; may be given several times.")
    ] = None,
    reading: ReadingOptions,
    sizes: Annotated[
        str | None, typer.Option(metavar="N,M", help="Numbers of records; all where none is given.")
    ] = None,
    lifelong: Annotated[
        bool,
        typer.Option(
            "--lifelong",
            help="One step of 10 facts after another: drawn facts, held-out text, seconds and bytes as they add up. "
            "A plan's file and --protocol go before it.",
        ),
    ] = False,
    method_options: MethodOptions,
    run_options: RunOptions,
    as_json: options.AsJson = False,
) -> None:
    """Run methods on models and data sets, and keep every answer in STORE.

    What STORE holds already is not done again: after a kill the same command goes on. The unedited model and the
    baselines ice, retrieval, ft-m and lora stand beside the methods unless --without names them. Under torchrun the
    ranks share the work. `kecore bench recipe.yaml` is `kecore bench recipe.sqlite --plan recipe.yaml`.
    """
    screen = Screen.of(context)
    if store.suffix in (".yaml", ".yml"):
        if plan is not None:
            raise typer.BadParameter(f"{store} is a plan, and --plan {plan} another one; name a store, or one plan")
        plan, store = store, Path(store.with_suffix(".sqlite").name)
    if not facts and reading.given():
        raise typer.BadParameter(f"{reading.given()[0]} is of --facts; a plan has it as a field of its 'facts'")
    if plan is None and not (model and facts):
        raise typer.BadParameter(
            "there is nothing to run: give --model and --facts (and --methods), or --plan FILE; what a store holds is "
            "shown by `kecore report STORE`"
        )
    if reading.sha256 is not None and len(facts or ()) > 1:
        raise typer.BadParameter("--sha256 is of one data set; give those of several in a plan's 'facts'")
    fields = {
        "models": model,
        "methods": options.names(methods),
        "facts": [data_entry(path, reading) for path in facts or ()],
        "sizes": options.names(sizes),
        **method_options.fields(),
    }
    from kecore_bench.store import Store

    bench_plan = make_plan(fields, run_options, plan, lifelong=lifelong)
    with Store(store, bench_plan.protocol) as results:
        cells = run_on_screen(screen, bench_plan, results, run_options)
        show_tables(screen, results, {cell.spec.key for cell in cells})
