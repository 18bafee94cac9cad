"""``kecore sign`` signs edit files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kecore.cli import options
from kecore.cli.console import Screen, make_fields
from kecore.cli.plugins import help_group

__all__ = ["sign"]


@help_group("Use edits elsewhere")
def sign(
    context: typer.Context,
    edit: Annotated[Path, typer.Argument(metavar="EDIT", help="An edit file or folder.", show_default=False)],
    key: Annotated[Path, typer.Option(metavar="FILE", help="Your private Ed25519 key, in PEM.", show_default=False)],
    as_json: options.AsJson = False,
) -> None:
    """Sign an edit: a file beside it says that it is yours.

    `kecore serve --trust FILE` takes only edits that one of the trusted keys has signed.
    """
    screen = Screen.of(context)
    from kecore.edit import load_edit
    from kecore.hub import EDIT, artifact_file
    from kecore_serve import signatures

    path = artifact_file(edit, EDIT)
    identity = load_edit(path).id  # nobody signs what is no edit
    written = signatures.sign(path, key)
    screen.show(make_fields({"edit": identity, "signature": str(written)}))
    screen.finish({"edit": identity, "file": str(path), "signature": str(written), "warnings": screen.warnings})
