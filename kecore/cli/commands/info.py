"""``kecore methods`` and ``kecore doctor``: what is installed, and whether it works."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kecore.api.errors import KecoreWarning
from kecore.cli import options
from kecore.cli.console import Screen, format_bytes, make_fields, make_table
from kecore.cli.plugins import CommandGroup

if TYPE_CHECKING:
    from kecore.api.registry import MethodInfo, PluginInfo
    from kecore.doctor import Report

__all__ = ["doctor", "methods"]


def methods(context: typer.Context, as_json: options.AsJson = False) -> None:
    """List the editing methods that are installed.

    With what each can do and needs, its paper and where it comes from; or why one cannot be used.
    """
    screen = Screen.of(context)
    from kecore.api import registry

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)  # what they say stands in the listing
        found = registry.default_registry().describe()
    _show_methods(screen, found)
    screen.finish({"methods": [method.to_json() for method in found]})


def _show_methods(screen: Screen, found: list[MethodInfo]) -> None:
    usable = [method for method in found if not method.error]
    rows = [
        (method.name, method.kind or "", _abilities(method), f"{method.distribution} {method.version}")
        for method in usable
    ]
    screen.show(make_table("method", "changes", "can, and needs", "from", rows=rows, title="Editing methods"))
    papers = {method.name: f"{method.reference}\n{method.origin}" for method in usable}
    screen.show(make_fields(papers))
    for method in found:
        if method.error:
            screen.show(f"[bold red]cannot be used:[/] {escape(method.name)}: {escape(method.error)}")


def _abilities(method: MethodInfo) -> str:
    """A method's capabilities in words."""
    flags = method.capabilities
    if flags is None:
        return ""
    words = {
        "many facts at once": flags.batch,
        "one fact at a time": not flags.batch,
        "edit after edit": flags.sequential,
        "reversible": flags.reversible,
        "needs key statistics": flags.needs_statistics,
        "needs training": flags.needs_training,
        "needs examples": flags.needs_examples,
    }
    return ", ".join(word for word, holds in words.items() if holds)


def doctor(
    context: typer.Context,
    bench: Annotated[
        bool, typer.Option("--bench", help="Measure the native operations instead, against torch and the peers' code.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Check this installation.

    Versions, devices, methods, cache, demo model and native operations, each with what is wrong and what to do. Ends
    with code 1 where KECORE_NATIVE asks for native code that cannot be had.
    """
    screen = Screen.of(context)
    if bench:
        from kecore.ops import measure

        with screen.stage("bench", "measuring the native operations, for about a minute"):
            measured = measure.measure_cases(screen.log)
        _show_bench(screen, measured)
        screen.finish(measured)
        return
    with screen.stage("report", "looking at the installation"):
        from kecore.doctor import make_report

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KecoreWarning)  # what they say stands in the report
            commands = CommandGroup.of(context).plugins.describe()
        found = make_report(commands)
    _show_report(screen, found)
    screen.finish(found.to_json())
    if found.refused:
        raise typer.Exit(1)


def _show_bench(screen: Screen, measured: dict[str, list[dict[str, Any]]]) -> None:
    for op, rows in measured.items():
        cells = [
            (
                f"{row['d']}",
                f"{row['n']}",
                row["dtype"],
                *(f"{1000 * row[f'{name}_s']:.1f} ms" for name in ("native", "torch", "peers")),
                *(f"{row[f'{name}_s'] / row['native_s']:.1f} x" for name in ("torch", "peers")),
                f"{row['relative_error']:.1e}",
            )
            for row in rows
        ]
        heads = ("d", "n", "keys", "kecore", "torch", "peers", "than torch", "than peers", "error")
        screen.show(make_table(*heads, rows=cells, title=op))


def _processor(found: Report) -> str:
    """What the CPU computes with: on one without bfloat16 products, asking for them costs time instead of saving it."""
    advice = "" if found.bfloat16_speed > 1 else " (leave precision=bfloat16 out)"
    return (
        f"{found.threads} thread{'s' * (found.threads > 1)}, {found.instructions}, "
        f"bfloat16 at {found.bfloat16_speed:.1f} times the speed of float32{advice}"
    )


def _listed(plugins: Sequence[PluginInfo]) -> str:
    return ", ".join(f"{plugin.name} (cannot be used)" if plugin.error else plugin.name for plugin in plugins)


def _show_report(screen: Screen, found: Report) -> None:
    devices = [f"{device.name} ({format_bytes(device.memory)}, {device.capability})" for device in found.devices]
    screen.show(
        make_fields(
            {
                "kecore": found.kecore,
                "python": f"{found.python}, {found.platform}",
                "packages": ", ".join(
                    f"{name} {version or 'not installed'}" for name, version in found.packages.items()
                ),
                "devices": ", ".join([*devices, f"CPU, {_processor(found)}"]),
                "CUDA": f"torch is built for {found.cuda_build}" if found.cuda_build else "torch is built without it",
                "cache": f"{found.cache.path} ({'writable' if found.cache.writable else 'NOT writable'}, "
                f"{format_bytes(found.cache.free)} free)",
                "demo model": found.demo or "not installed",
                "methods": _listed(found.methods),
                "commands": f"kecore's own, and of plugins: {_listed(found.commands) or 'none'}",
            }
        )
    )
    rows = [(b.op, b.backend, b.reason, f"{b.relative_error:.1e}") for b in found.backends]
    if rows:
        screen.show(make_table("operation", "runs as", "because", "error", rows=rows, title="Native operations"))
    for problem in found.problems:
        screen.show(f"[bold yellow]problem:[/] {escape(problem)}")
    if not found.problems:
        screen.show("[green]No problems found.[/]")
