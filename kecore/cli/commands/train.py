"""``kecore train``: a trained editor for one model from records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kecore.api.errors import UnsupportedCapabilityError
from kecore.cli import options
from kecore.cli.console import Screen, count_noun, format_bytes, format_score, make_fields, make_table
from kecore.cli.groups import ReadingOptions, take_groups
from kecore.cli.hparams import take_hparams
from kecore.cli.loading import Loading
from kecore.cli.machine import measure_cost, show_cost
from kecore.environment import environment

if TYPE_CHECKING:
    from kecore.trained import TrainedEditor

__all__ = ["curve_table", "train"]

_SHOWN = 8  # points of the held-out curve


@take_groups
def train(
    context: typer.Context,
    *,
    method: Annotated[str, typer.Argument(metavar="METHOD", help="A method that trains.", show_default=False)],
    model: options.Model,
    data: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Records to train on, in any layout of --facts.", show_default=False),
    ],
    out: options.Out,
    limit: options.Limit = None,
    reading: ReadingOptions,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Updates.", min=1, show_default="the method's own")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Records of an update.", min=1, show_default="the method's own")
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Records that are measured and not trained on.", min=1, show_default="the method's own"
        ),
    ] = None,
    evaluate_every: Annotated[
        int | None,
        typer.Option(metavar="N", help="Updates between two measurements.", min=1, show_default="the method's own"),
    ] = None,
    preset: options.Preset = None,
    hparams: options.Hparams = None,
    set_: options.Settings = None,
    chat: options.Chat = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Train a method that needs it, such as MEND, for one model.

    The result goes to `kecore edit --trained`. A run that was interrupted goes on where it stopped.
    """
    screen = Screen.of(context)
    from kecore.api.line import MethodLine
    from kecore.hub import TRAINED
    from kecore.training import Trainable
    from kecore.training import train as run

    theirs = take_hparams(screen, context, hparams, method=method, preset=preset)
    line = MethodLine.of(method if theirs is None else theirs.method)
    cls, instance = line.method, line.method()
    if not isinstance(instance, Trainable):
        raise UnsupportedCapabilityError(f"method '{cls.name}' needs no training; use it with `kecore edit` as it is")
    options_of_schedule = {
        "steps": steps,
        "batch_size": batch_size,
        "held_out": held_out,
        "evaluate_every": evaluate_every,
    }
    changes = {name: value for name, value in options_of_schedule.items() if value is not None}
    schedule = replace(instance.schedule, **changes)
    given = theirs.fields if theirs is not None else {}
    config = line.make_config({**given, **options.settings(set_)}, preset=preset)
    config.check_installed()
    records = reading.load(data, limit)
    options.check_free(out, TRAINED, force)
    loaded = Loading(model, device, dtype, trust_remote_code, seed).load(screen)
    with screen.stage("read", "reading the model's structure"):
        from kecore.model import ModelView
        from kecore.text import Encoder

        view = ModelView.of(loaded.model)
        encoder = Encoder(loaded.tokenizer, chat=chat, max_length=view.max_length, handover=view.handover_ids)
    doing = (
        f"training {cls.name} for {count_noun(schedule.steps, 'step')} of {count_noun(schedule.batch_size, 'record')}"
    )
    with screen.stage("train", doing):
        trained = run(
            cls, view, encoder, records, config, schedule=schedule, seed=seed, out=out,
            progress=screen.progress, report=lambda point: screen.log(_words(point)),
        )  # fmt: skip
    path = out / TRAINED
    screen.show(make_fields({"trained editor": f"{path} ({format_bytes(path.stat().st_size)})"}), curve_table(trained))
    spent = measure_cost(screen, view.device)
    show_cost(screen, spent)
    screen.commands(
        "Next", f"kecore edit {quote(model)} --method {cls.name} --trained {quote(str(out))} --facts FILE --out my-edit"
    )
    values = {**trained.inspect(), "path": path, "model_ref": model, "data": data}
    screen.finish({**values, **spent, **environment(view.device), "warnings": screen.warnings})


def curve_table(trained: TrainedEditor) -> Any:
    """Make a table of a training's held-out curve: at most a few of its points, the best and the last among them."""
    curve: list[dict[str, float]] = trained.record["curve"]
    best = trained.record["best_step"]
    interval = max(1, math.ceil(len(curve) / _SHOWN))
    names = list(curve[0])
    rows: list[list[str]] = []
    for index, point in enumerate(curve):
        is_best = point["step"] == best
        if index % interval == 0 or is_best or index == len(curve) - 1:
            mark = " *" if is_best else ""
            rows.append([f"{point['step']:.0f}{mark}", *(format_score(point[name]) for name in names[1:])])
    return make_table(
        *names,
        rows=rows,
        title=f"On {trained.record['schedule']['held_out']} held-out records (* the step that was kept)",
        right=range(len(names)),
    )


def _words(point: Mapping[str, float]) -> str:
    figures = ", ".join(f"{name} {format_score(value)}" for name, value in point.items() if name != "step")
    return f"step {point['step']:.0f}: {figures}"
