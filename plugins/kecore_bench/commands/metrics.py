"""``kecore metrics``: what each score and each column of a table says."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kecore.api.errors import ConfigError
from kecore.cli import options
from kecore.cli.console import Screen, make_fields, make_table
from kecore.cli.plugins import help_group

if TYPE_CHECKING:
    from kecore.evaluate.metrics import Metric

__all__ = ["metrics"]


@help_group("Measure")
def metrics(
    context: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A metric, a column's heading, or a family.", show_default=False),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """List the metrics: what stands above a column of a table, and what it says.

    Standard families are always taken, others where the protocol names them: --protocol 'extra=["kl"]'. What the edits
    cost stands in the last columns of a table.
    """
    from kecore.evaluate.metrics import STANDARD, families
    from kecore_bench.report.costs import COSTS

    screen = Screen.of(context)
    offered = families()
    listed: list[dict[str, Any]] = []
    for family in (*STANDARD, *sorted(offered.keys() - set(STANDARD))):
        for metric in offered.get(family, ()):
            listed.append(_to_json(metric, family, extra=family not in STANDARD))
    costs = [{"key": cost.key, "heading": cost.heading, "meaning": cost.meaning, "better": "lower"} for cost in COSTS]
    if name is not None:
        listed = _matching(name, listed)
        costs = []
    for title, is_extra in (("Standard metrics", False), ("Further metrics, of families in extra=[...]", True)):
        rows = [_row(metric) for metric in listed if metric["extra"] == is_extra]
        if rows and len(listed) > 1:
            screen.show(make_table("column", "what it says; key and family", rows=rows, title=title, lines=True))
    if len(listed) == 1:
        screen.show(make_fields({key: str(value) for key, value in listed[0].items() if value not in ("", [])}))
    if costs:
        rows = [(cost["heading"], f"{cost['meaning']}\n{cost['key']}") for cost in costs]
        screen.show(make_table("column", "what it says; key", rows=rows, title="Costs; lower is better", lines=True))
        screen.show("[dim]Definitions, formulas and sources: docs/metrics.md[/]")
    screen.finish({"metrics": listed, "costs": costs})


def _to_json(metric: Metric, family: str, *, extra: bool) -> dict[str, Any]:
    """Return what is to know of a metric."""
    return {
        "key": metric.key,
        "heading": metric.heading or metric.name,
        "meaning": metric.meaning,
        "better": "lower" if metric.lower else "higher",
        "of": metric.kind.replace("_", " "),
        "bounds": list(metric.bounds),
        "family": family,
        "extra": extra,
        "core": metric.core,
        "reads": list(metric.reads),
    }


def _row(metric: dict[str, Any]) -> tuple[str, str]:
    lower = "; lower is better" if metric["better"] == "lower" else ""
    return metric["heading"], f"{metric['meaning']}{lower}\n{metric['key']}, {metric['family']}"


def _matching(name: str, listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the metrics that a name may mean.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    matching = [metric for metric in listed if name.casefold() in (metric["key"], metric["heading"].casefold())]
    matching = matching or [metric for metric in listed if metric["family"] == name.casefold()]
    if matching:
        return matching
    names = dict.fromkeys(text for metric in listed for text in (metric["key"], metric["heading"], metric["family"]))
    near = get_close_matches(name, list(names), n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise ConfigError(f"there is no metric, column or family '{name}'; {hint}`kecore metrics` lists them")
