"""``kecore bench``: methods x models x data sets x sizes into a store that survives a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kecore.cli import options
from kecore.cli.console import Screen
from kecore_bench.commands.shared import make_plan, run_on_screen, show_tables

__all__ = ["bench"]


def bench(
    context: typer.Context,
    store: options.StorePath,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A YAML file with the fields of a plan; options go before it.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="A model; may be given several times.")
    ] = None,
    methods: options.Methods = None,
    facts: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="A data set; may be given several times.")
    ] = None,
    data_format: options.Format = None,
    split: options.Split = None,
    variant: options.Variant = None,
    sha256: options.Checksum = None,
    sizes: Annotated[
        str | None, typer.Option(metavar="N,M", help="Numbers of records; all where none is given.")
    ] = None,
    without: options.Without = None,
    protocol: options.ProtocolFields = None,
    stats: options.Stats = None,
    text: options.Texts = None,
    tokens: options.Tokens = None,
    trained: options.TrainedEditors = None,
    examples: options.Examples = None,
    references: options.References = None,
    jobs: options.Jobs = 1,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="DTYPE", help="auto, float32, bfloat16 or float16.")] = None,
    memory: options.Memory = "auto",
    trust_remote_code: options.RemoteCode = False,
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
    reading = (data_format, split, variant, sha256)
    if not facts and any(reading):
        raise typer.BadParameter("--format, --split, --variant and --sha256 are of --facts; a plan has them as fields")
    if sha256 is not None and len(facts or ()) > 1:
        raise typer.BadParameter("--sha256 is of one data set; give those of several in a plan's 'facts'")
    fields: dict[str, Any] = {
        "models": model,
        "methods": options.names(methods),
        "facts": [options.data_entry(path, *reading) for path in facts or ()],
        "sizes": options.names(sizes),
        "without": options.names(without),
        "stats": stats,
        "text": text,
        "tokens": tokens,
        "trained": trained,
        "examples": examples,
        "references": references,
        "device": device,
        "dtype": dtype,
        "memory": options.byte_count(memory),
        "trust_remote_code": trust_remote_code or None,
    }
    from kecore_bench.store import Store

    made = make_plan(plan, fields, protocol)
    with Store(store, made.protocol) as results:
        cells = run_on_screen(screen, made, results, jobs)
        show_tables(screen, results, {cell.spec.key for cell in cells})
