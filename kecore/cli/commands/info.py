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
    from kecore.catalogue import MethodCard, MethodCatalogue
    from kecore.doctor import Report

__all__ = ["doctor", "methods"]


def methods(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show what can be set of this one.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Say which set-ups are for one of its shape.", show_default=False),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """List the installed editing methods, and what to take when.

    And the stages that can be added to them. With NAME, such as memit or 'memit + blue', what the method does, can,
    needs and costs, its fields with type, default, bounds and meaning, and its published set-ups; with MODEL, too,
    which of these are for a model of that many layers, that width and that vocabulary.
    """
    screen = Screen.of(context)
    if name is not None:
        _show_method(screen, name, model)
        return
    from kecore.api import registry
    from kecore.api.stage import installed_stages
    from kecore.catalogue import methods as catalogue

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)  # what they say stands in the listing
        offered = registry.default_registry().describe()
        stages = installed_stages().describe()
    _show_methods(screen, catalogue(), offered)
    _show_stages(screen, stages)
    screen.commands("Next", "kecore methods memit", "kecore methods 'memit + blue'")
    screen.finish(
        {"methods": [method.to_json() for method in offered], "stages": [stage.to_json() for stage in stages]}
    )


def _fitting_presets(card: MethodCard, model: str) -> list[str]:
    """Return the names of the published set-ups for a model of one's shape, which is read without its weights."""
    from kecore.api.config import ModelShape
    from kecore.models import load_config

    shape = ModelShape.of_config(load_config(model))
    return [name for name, preset in card.presets.items() if preset.model == shape]


def _show_method(screen: Screen, name: str, model: str | None) -> None:
    """Show what is to know of one method, and of the stages behind it."""
    from kecore.catalogue import methods as catalogue

    card = catalogue(name)
    fitting = None if model is None else _fitting_presets(card, model)
    screen.show(make_fields(card.about()))
    rows = [(field.name, field.type, _shown(field.default), field.bounds, field.meaning) for field in card.fields]
    screen.show(make_table("field", "type", "default", "bounds", "meaning", rows=rows, title="--set FIELD=VALUE"))
    for preset_name, preset in card.presets.items():
        values = ", ".join(f"{key}={_shown(value)}" for key, value in preset.fields.items())
        screen.show("")
        screen.show(
            make_fields(
                {
                    "--preset": preset_name,
                    "from": preset.source,
                    "sets": values,
                    "differs": " ".join(preset.differs or ["in nothing that is known"]),
                }
            )
        )
    values = {**card.about(), **card.to_json()}
    if fitting is not None:
        shown = ", ".join(f"--preset {preset}" for preset in fitting) or "none"
        screen.show(f"\n[bold]published for a model of {escape(str(model))}'s shape:[/] {escape(shown)}")
        values["fitting_presets"] = fitting
    screen.finish(values)


def _shown(value: object) -> str:
    """Write a value as --set takes it."""
    import json

    return value if isinstance(value, str) else json.dumps(to_plain_json(value))


def _show_methods(screen: Screen, catalogue: MethodCatalogue, offered: list[MethodInfo]) -> None:
    """Show the methods by what they are for, in each row the best measured first; and those that cannot be used."""
    groups: dict[str, list[MethodCard]] = {}
    for card in catalogue:
        groups.setdefault(card.use_when, []).append(card)
    rows: list[tuple[str, str]] = []
    for use_when, cards in sorted(groups.items(), key=lambda item: -len(item[1])):
        ordered = sorted(cards, key=_measured_mean, reverse=True)
        rows.append((use_when, ", ".join(card.title for card in ordered)))
    title = f"{len(catalogue)} editing methods; in each row the best first, by lone edits of one small model"
    screen.show(make_table("take one when", "methods", rows=rows, title=title))
    families = {family: str(len(cards)) for family, cards in catalogue.families().items()}
    screen.show(f"[dim]Families: {', '.join(f'{name} ({number})' for name, number in families.items())}.[/]")
    for method in offered:
        if method.error:
            screen.show(f"[bold red]cannot be used:[/] {escape(method.name)}: {escape(method.error)}")


def _measured_mean(card: MethodCard) -> float:
    """Return the harmonic mean of what a method scored; 0 where something was not measured."""
    measured = card.measured
    scores = () if measured is None else (measured.success, measured.paraphrases, measured.neighbours)
    if not scores or not all(scores):
        return 0.0
    return len(scores) / sum(1 / score for score in scores if score)


def _show_stages(screen: Screen, stages: list[StageInfo]) -> None:
    rows = [(stage.name, stage.summary) for stage in stages if not stage.error]
    screen.show(make_table("stage", "does", rows=rows, title="Stages, as in 'memit + blue'"))
    for stage in stages:
        if stage.error:
            screen.show(f"[bold red]cannot be used:[/] {escape(stage.name)}: {escape(stage.error)}")


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
