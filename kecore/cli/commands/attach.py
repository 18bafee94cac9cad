"""``kecore attach`` and ``kecore revert`` put edits into a checkpoint and take them out again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kecore.cli import options
from kecore.cli.console import Screen, count_noun, make_fields
from kecore.cli.loading import Loading
from kecore.cli.machine import measure_cost, show_cost

if TYPE_CHECKING:
    from torch import nn

    from kecore.checkpoint import Written

__all__ = ["attach", "revert"]


def attach(
    context: typer.Context,
    model: options.Model,
    edits: Annotated[list[Path], typer.Argument(metavar="EDIT", help="Edit files or folders.", show_default=False)],
    out: options.Out,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Write MODEL with edits on it as a checkpoint.

    Any program that reads Hugging Face checkpoints can load --out. It also carries what `kecore revert` needs.
    MODEL may itself be such a checkpoint: its edits stay, and new ones for the same base join them; those that were
    made for the edited checkpoint take it for their base.
    """
    screen = Screen.of(context)
    from kecore.checkpoint import NamedEdit, attach_edits, read_record
    from kecore.files import check_new_folder

    check_new_folder(out)
    named = [NamedEdit.read(path) for path in edits]
    if read_record(model) is not None and dtype != "auto":
        raise typer.BadParameter(f"{model} carries edits, so its weights keep their type; leave out --dtype")
    loaded = Loading(model, device, dtype, trust_remote_code, seed).load(screen)
    written = attach_edits(loaded, named, out, show=screen.stage)
    _report(screen, loaded.model, written)


def revert(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A directory that `kecore attach` wrote.", show_default=False)
    ],
    out: options.Out,
    number: Annotated[
        list[int] | None,
        typer.Option(
            "--edit",
            metavar="NUMBER",
            help="Take off only this edit (repeatable); `kecore inspect CHECKPOINT` numbers them.",
            show_default="all",
        ),
    ] = None,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Take edits off a checkpoint, bit for bit.

    The result is proven by fingerprint. Edits can be taken off in any order; a checkpoint that was changed since is
    left alone.
    """
    screen = Screen.of(context)
    from kecore.checkpoint import need_record, take_off_edits
    from kecore.files import check_new_folder

    check_new_folder(out)
    record = need_record(checkpoint)
    numbers = record.check_numbers(number or ())
    loaded = Loading(str(checkpoint), device).load(screen)
    written = take_off_edits(loaded, out, numbers, show=screen.stage)
    screen.show(f"The base weights of '{record.model}' are back, bit for bit (fingerprint {record.base[:12]}).")
    _report(screen, loaded.model, written, taken_off=numbers)


def _report(screen: Screen, model: nn.Module, written: Written, **more: Any) -> None:
    """Say what was written, for people and for programs."""
    facts = sum(len(edit["requests"]) for edit in written.edits)
    summary = {
        "checkpoint": str(written.folder),
        "edits": f"{count_noun(len(written.edits), 'edit')} with {count_noun(facts, 'fact')}",
        "changed": ", ".join(written.parameters) or "-",
    }
    screen.show(make_fields(summary))
    spent = measure_cost(screen, next(model.parameters()).device)
    show_cost(screen, spent)
    screen.finish(
        {
            "checkpoint": str(written.folder),
            "model": written.model,
            "edits": [{**edit, "file": edit["source"]} for edit in written.edits],
            "parameters": written.parameters,
            "base": written.base,
            "edited": written.edited,
            **more,
            **spent,
            "warnings": screen.warnings,
        }
    )
