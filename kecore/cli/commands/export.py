"""``kecore export``: an edit as a LoRA adapter for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kecore.api.errors import UnsupportedCapabilityError
from kecore.cli import options
from kecore.cli.console import Screen, make_fields

__all__ = ["export"]


def export(
    context: typer.Context,
    edit: Annotated[Path, typer.Argument(metavar="EDIT", help="An edit file or folder.", show_default=False)],
    out: options.Out,
    base: Annotated[
        str, typer.Option("--base", metavar="MODEL", help="Name of the base model, written into the adapter.")
    ] = "",
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Write EDIT as a LoRA adapter in PEFT's format.

    peft, vLLM and other programs load it beside the base model. Edits whose updates have full rank cannot be written
    so; `kecore attach` makes a checkpoint of them.
    """
    screen = Screen.of(context)
    from kecore.edit import WeightEdit, load_edit
    from kecore.edit.adapter import CONFIG, export_adapter

    options.check_free(out, CONFIG, force)
    with screen.stage("export", f"writing {out}"):
        loaded = load_edit(edit)
        if not isinstance(loaded, WeightEdit):
            raise UnsupportedCapabilityError(f"{edit} changes no weights, so it cannot become an adapter")
        export_adapter(loaded, out, base=base)
    rank = max(update.rank for update in loaded.updates.values())
    screen.show(make_fields({"adapter": str(out), "matrices": str(len(loaded.updates)), "rank": str(rank)}))
    screen.finish({"adapter": out, "matrices": list(loaded.updates), "rank": rank, "warnings": screen.warnings})
