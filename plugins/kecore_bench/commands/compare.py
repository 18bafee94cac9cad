"""``kecore compare``: methods side by side on the same records, as a table, files and a page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from kecore.cli import options
from kecore.cli.console import Screen, make_fields
from kecore.cli.groups import ReadingOptions, take_groups
from kecore.cli.plugins import help_group
from kecore_bench.commands import options as bench_options
from kecore_bench.commands.groups import MethodOptions, RunOptions
from kecore_bench.commands.shared import data_entry, make_plan, run_on_screen, show_tables

__all__ = ["compare"]

STORE = "results.sqlite"


@help_group("Measure")
@take_groups
def compare(
    context: typer.Context,
    *,
    model: options.Model,
    methods: bench_options.MethodNames,
    facts: Annotated[str, typer.Option(metavar="FILE", help="Facts with their probes.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Directory for the result.", show_default="compare-MODEL-FACTS"),
    ] = None,
    presets: bench_options.MethodPresets = None,
    hparams: bench_options.MethodHparams = None,
    set_: bench_options.MethodSettings = None,
    limit: options.Limit = None,
    reading: ReadingOptions,
    method_options: MethodOptions,
    run_options: RunOptions,
    as_json: options.AsJson = False,
) -> None:
    """Compare methods on the same facts by the same protocol.

    Writes the store of all answers, the tables as text, JSON and CSV, and one HTML page with plots into --out, or into
    a folder named after MODEL and FILE where one is not given. The same command goes on where it was cut off. The
    baselines stand beside the methods unless --without names them.
    """
    from kecore_bench.report import FIGURES, FORMATS, write_report
    from kecore_bench.store import Store

    screen = Screen.of(context)
    out = out or Path(f"compare-{_file_name(model.removesuffix('.gguf'))}-{_file_name(facts.partition('.json')[0])}")
    fields = {
        "models": model,
        "methods": bench_options.method_entries(options.names(methods), presets, set_, hparams),
        "facts": data_entry(facts, reading),
        "sizes": limit,
        **method_options.fields(),
    }
    plan = make_plan(fields, run_options)
    with Store(out / STORE, plan.protocol) as store:
        run_on_screen(screen, plan, store, run_options)
        written = write_report([store], out, [name for name in FORMATS if name not in (*FIGURES, "latex")])
        screen.show(make_fields({"page": str(written["html"][0]), "files": ", ".join(p.name for p in out.iterdir())}))
        show_tables(screen, store, {spec.key for spec in store.specs()})


def _file_name(ref: str) -> str:
    """Return the last part of a path, a hub id or a data set as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", Path(ref).resolve().name)
