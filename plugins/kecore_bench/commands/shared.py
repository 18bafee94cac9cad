"""What ``kecore eval``, ``bench`` and ``compare`` share: a plan from options, its runs, and their tables."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import typer

from kecore.api.errors import ConfigError
from kecore.cli import options
from kecore.cli.console import Screen

if TYPE_CHECKING:
    from kecore.evaluate.protocol import Protocol
    from kecore_bench.cells import Cell
    from kecore_bench.plan import BenchPlan
    from kecore_bench.report import Table
    from kecore_bench.store import Store

__all__ = ["make_plan", "make_protocol", "run_on_screen", "show_tables"]


def make_plan(file: Path | None, fields: dict[str, Any], protocol: list[str] | None) -> BenchPlan:
    """Make a plan from a file and options, which go before it.

    Raises:
        ConfigError: a bad field.
    """
    from kecore_bench.plan import BenchPlan, read_plan

    values = read_plan(file) if file is not None else {}
    values |= {name: value for name, value in fields.items() if value not in (None, [], ())}
    given = values.get("protocol") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"'protocol' holds fields, got {given!r}")
    values["protocol"] = make_protocol(given, protocol)
    return BenchPlan.make(values)


def make_protocol(values: dict[str, Any], given: list[str] | None) -> Protocol:
    """Make a protocol from fields and ``key=value`` options, which go before them."""
    from kecore.evaluate.protocol import Protocol

    return Protocol.make({**values, **options.settings(given, "--protocol")})


def run_on_screen(screen: Screen, plan: BenchPlan, store: Store, jobs: int) -> list[Cell]:
    """Do what a store lacks of a plan, and show what goes on.

    Raises:
        Exit: this is a further rank of ``torchrun``; the first one has the result.
    """
    from kecore_bench.processes import run_plan
    from kecore_bench.ranks import here

    rank = here().rank
    screen.err.quiet = screen.err.quiet or rank > 0
    cells = run_plan(plan, store, jobs=jobs, progress=screen.progress, log=screen.log, stage=_stage_on(screen))
    if rank > 0:
        raise typer.Exit
    return cells


def _stage_on(screen: Screen) -> Callable[[str, str], AbstractContextManager[None]]:
    def stage(name: str, doing: str) -> AbstractContextManager[None]:
        return screen.stage(name, doing, bar=name != "load")  # a download shows a bar of its own

    return stage


def show_tables(screen: Screen, store: Store, keys: set[str]) -> list[Table]:
    """Print the tables of some runs of a store, and return them."""
    from kecore_bench.report import results, tables
    from kecore_bench.report.text import rich_notes, rich_table

    made = tables(results(store, keys=keys))
    for table in made:
        screen.show(rich_table(table, screen.out.width))
        for line in rich_notes(table):
            screen.show(f"  [dim]{line}[/]")
    protocol = store.protocol
    screen.show(f"[dim]Protocol {protocol.hash()}: {protocol.describe()}.[/]")
    if store.kept:
        screen.commands("Next", f"kecore report {quote(str(store.path))}")
    screen.finish({"store": store.path, "tables": [table.to_json() for table in made], "warnings": screen.warnings})
    return made
