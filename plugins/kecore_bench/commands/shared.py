"""Functions that ``kecore eval``, ``bench`` and ``compare`` share: a plan from options, its runs, and their tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import typer

from kecore.api.errors import ConfigError
from kecore.cli import options
from kecore.cli.console import Screen

if TYPE_CHECKING:
    from kecore.cli.groups import ReadingOptions
    from kecore_bench.cells import Cell
    from kecore_bench.commands.groups import RunOptions
    from kecore_bench.plan import BenchPlan
    from kecore_bench.store import Store

__all__ = ["LIFELONG", "data_entry", "make_plan", "run_on_screen", "show_tables"]


LIFELONG = {"edits": "sequential", "step": 10, "retention": 9, "sample": 100, "max_new_tokens": 0}
"""The protocol of ``--lifelong``, where neither a plan's file nor ``--protocol`` says otherwise."""


def data_entry(path: str, reading: ReadingOptions) -> dict[str, Any]:
    """Return a data set as a plan's ``facts`` take it."""
    return {
        "path": path,
        "format": reading.data_format,
        "split": reading.split,
        "variant": reading.variant,
        "sha256": reading.sha256,
        "map": None if reading.field_map is None else reading.field_map.sources,
    }


def make_plan(
    fields: Mapping[str, Any], run_options: RunOptions, file: Path | None = None, *, lifelong: bool = False
) -> BenchPlan:
    """Make a plan from options and a file; options go before it.

    Args:
        fields: the fields of the plan that are the command's own; None and what is empty count as not given.
        run_options: the other options.
        file: the plan's YAML file.
        lifelong: measure a long sequence, by :data:`LIFELONG` and with held-out text.

    Raises:
        ConfigError: a bad field.
    """
    from kecore.evaluate.protocol import Protocol
    from kecore_bench.plan import BenchPlan, read_plan

    values = {} if file is None else read_plan(file)
    for name, value in {**fields, **run_options.fields()}.items():
        if value not in (None, [], ()):
            values[name] = value
    protocol = values.get("protocol") or {}
    if not isinstance(protocol, dict):
        raise ConfigError(f"'protocol' holds fields, got {protocol!r}")
    if lifelong:
        protocol = {**LIFELONG, **protocol}
        values.setdefault("held_out", {})
    values["protocol"] = Protocol.make({**protocol, **options.settings(run_options.protocol, "--protocol")})
    return BenchPlan.make(values)


def run_on_screen(screen: Screen, plan: BenchPlan, store: Store, run_options: RunOptions) -> list[Cell]:
    """Do what a store lacks of a plan, show what goes on, and tell the trackers that were asked for.

    Raises:
        Exit: this is a further rank of ``torchrun``; the first one has the result.
    """
    from kecore_bench.processes import run_plan
    from kecore_bench.ranks import here
    from kecore_bench.trackers import open_tracker

    rank = here().rank
    screen.err.quiet = screen.err.quiet or rank > 0
    trackers = [open_tracker(text) for text in run_options.track or () if rank == 0]
    cells = run_plan(
        plan,
        store,
        jobs=run_options.jobs,
        progress=screen.progress,
        log=screen.log,
        stage=_stage_on(screen),
        trackers=trackers,
    )
    if rank > 0:
        raise typer.Exit
    return cells


def _stage_on(screen: Screen) -> Callable[[str, str], AbstractContextManager[None]]:
    """Return what a run times its stages by, so that the screen shows them."""

    def stage(name: str, doing: str) -> AbstractContextManager[None]:
        return screen.stage(name, doing, bar=name != "load")  # a download shows a bar of its own

    return stage


def show_tables(screen: Screen, store: Store, keys: set[str]) -> None:
    """Print the tables of some runs of a store, of which ``keys`` are the keys."""
    from kecore_bench.report import results, tables
    from kecore_bench.report.text import rich_notes, rich_table

    shown = tables(results(store, keys=keys))
    for table in shown:
        screen.show(rich_table(table, screen.out.width))
        for line in rich_notes(table):
            screen.show(f"  [dim]{line}[/]")
    protocol = store.protocol
    screen.show(f"[dim]Protocol {protocol.hash()}: {protocol.describe()}.[/]")
    if store.on_disk:
        screen.commands("Next", f"kecore report {quote(str(store.path))}")
    screen.finish({"store": store.path, "tables": [table.to_json() for table in shown], "warnings": screen.warnings})
