"""``kecore methods`` and ``kecore doctor``: what is installed, and whether it works."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kecore.api.errors import KecoreWarning
from kecore.cli import options
from kecore.cli.console import Screen, count_noun, format_bytes, make_fields, make_table, to_plain_json
from kecore.cli.plugins import CommandGroup

if TYPE_CHECKING:
    from kecore.api.plugins import PluginInfo
    from kecore.api.registry import MethodInfo
    from kecore.api.stage import StageInfo
    from kecore.api.types import Capabilities
    from kecore.doctor import Report

__all__ = ["doctor", "methods"]


def methods(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show what can be set of this one.", show_default=False)
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """List the editing methods that are installed, and the stages that can be added to them.

    With what each can do and needs, its paper and where it comes from; or why one cannot be used. With NAME, such as
    memit or 'memit + blue', its fields with type, default, bounds and meaning, and its published set-ups.
    """
    screen = Screen.of(context)
    if name is not None:
        _show_method(screen, name)
        return
    from kecore.api import registry
    from kecore.api.stage import installed_stages

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)  # what they say stands in the listing
        offered = registry.default_registry().describe()
        stages = installed_stages().describe()
    _show_methods(screen, offered)
    _show_stages(screen, stages)
    screen.finish(
        {"methods": [method.to_json() for method in offered], "stages": [stage.to_json() for stage in stages]}
    )


def _show_method(screen: Screen, name: str) -> None:
    """Show what is to know of one method, and of the stages behind it."""
    from kecore.api.describe import config_fields
    from kecore.api.line import MethodLine

    line = MethodLine.of(name)
    method, capabilities = line.method, line.capabilities
    fields = config_fields(method.Config)
    presets = {preset: dict(values) for preset, values in method.Config.presets().items()}
    about = {
        "method": line.name,
        "changes": capabilities.kind,
        "can, and needs": _abilities(capabilities),
        "paper": method.reference,
        "docs": f"docs/methods/{method.name}.md",
    }
    screen.show(make_fields(about))
    rows = [(field.name, field.type, _shown(field.default), field.bounds, field.meaning) for field in fields]
    screen.show(make_table("field", "type", "default", "bounds", "meaning", rows=rows, title="--set FIELD=VALUE"))
    if presets:
        rows_of_presets: list[tuple[str, str]] = []
        for preset, values in presets.items():
            rows_of_presets.append((preset, ", ".join(f"{key}={_shown(value)}" for key, value in values.items())))
        screen.show(make_table("preset", "sets", rows=rows_of_presets, title="--preset NAME"))
    screen.finish({**about, "fields": [field.to_json() for field in fields], "presets": presets})


def _shown(value: object) -> str:
    """Write a value as --set takes it."""
    import json

    return value if isinstance(value, str) else json.dumps(to_plain_json(value))


def _show_methods(screen: Screen, offered: list[MethodInfo]) -> None:
    usable = [method for method in offered if not method.error]
    rows = [
        (method.name, method.kind or "", _abilities(method.capabilities), f"{method.distribution} {method.version}")
        for method in usable
    ]
    screen.show(make_table("method", "changes", "can, and needs", "from", rows=rows, title="Editing methods"))
    papers = {method.name: f"{method.reference}\n{method.origin}" for method in usable}
    screen.show(make_fields(papers))
    for method in offered:
        if method.error:
            screen.show(f"[bold red]cannot be used:[/] {escape(method.name)}: {escape(method.error)}")


def _show_stages(screen: Screen, stages: list[StageInfo]) -> None:
    usable = [stage for stage in stages if not stage.error]
    rows = [
        (stage.name, stage.summary, ", ".join(stage.settings), f"{stage.distribution} {stage.version}")
        for stage in usable
    ]
    screen.show(make_table("stage", "does", "settings", "from", rows=rows, title="Stages, as in 'memit + blue'"))
    for stage in stages:
        if stage.error:
            screen.show(f"[bold red]cannot be used:[/] {escape(stage.name)}: {escape(stage.error)}")


def _abilities(flags: Capabilities | None) -> str:
    """Describe a method's capabilities in words."""
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
        "needs a subject": flags.needs_subject,
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
        report = make_report(commands)
    _show_report(screen, report)
    screen.finish(report.to_json())
    if report.refused:
        raise typer.Exit(1)


def _show_bench(screen: Screen, measured: dict[str, list[dict[str, Any]]]) -> None:
    for op, rows in measured.items():
        headers = ("d", "n", "keys", "kecore", "torch", "peers", "than torch", "than peers", "error")
        screen.show(make_table(*headers, rows=[_bench_cells(row) for row in rows], title=op))


def _bench_cells(row: dict[str, Any]) -> list[str]:
    """Write one measured case: its size, the times of all, how many times as fast kecore is, and its error."""
    cells = [str(row["d"]), str(row["n"]), row["dtype"]]
    cells += [f"{1000 * row[f'{name}_s']:.1f} ms" for name in ("native", "torch", "peers")]
    cells += [f"{row[f'{name}_s'] / row['native_s']:.1f} x" for name in ("torch", "peers")]
    return [*cells, f"{row['relative_error']:.1e}"]


def _processor(report: Report) -> str:
    """Describe the CPU: on one without bfloat16 products, asking for them costs time instead of saving it."""
    advice = "" if report.bfloat16_speed > 1 else " (leave precision=bfloat16 out)"
    return (
        f"{count_noun(report.threads, 'thread')}, {report.instructions}, "
        f"bfloat16 at {report.bfloat16_speed:.1f} times the speed of float32{advice}"
    )


def _list_plugins(plugins: Sequence[PluginInfo]) -> str:
    return ", ".join(f"{plugin.name} (cannot be used)" if plugin.error else plugin.name for plugin in plugins)


def _show_report(screen: Screen, report: Report) -> None:
    devices = [f"{device.name} ({format_bytes(device.memory)}, {device.capability})" for device in report.devices]
    screen.show(
        make_fields(
            {
                "kecore": report.kecore,
                "python": f"{report.python}, {report.platform}",
                "packages": ", ".join(
                    f"{name} {version or 'not installed'}" for name, version in report.packages.items()
                ),
                "devices": ", ".join([*devices, f"CPU, {_processor(report)}"]),
                "CUDA": f"torch is built for {report.cuda_build}" if report.cuda_build else "torch is built without it",
                "cache": f"{report.cache.path} ({'writable' if report.cache.writable else 'NOT writable'}, "
                f"{format_bytes(report.cache.free)} free)",
                "demo model": report.demo or "not installed",
                "methods": _list_plugins(report.methods),
                "commands": f"kecore's own, and of plugins: {_list_plugins(report.commands) or 'none'}",
            }
        )
    )
    rows = [(b.op, b.backend, b.reason, f"{b.relative_error:.1e}") for b in report.backends]
    if rows:
        screen.show(make_table("operation", "runs as", "because", "error", rows=rows, title="Native operations"))
    for problem in report.problems:
        screen.show(f"[bold yellow]problem:[/] {escape(problem)}")
    if not report.problems:
        screen.show("[green]No problems found.[/]")
