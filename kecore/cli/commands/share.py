"""``kecore push`` and ``kecore pull`` share edits, key statistics and trained editors on the Hugging Face hub."""

from __future__ import annotations

from shlex import quote
from typing import Annotated

import typer

from kecore.cli import options
from kecore.cli.console import Screen, format_bytes, make_fields

__all__ = ["pull", "push"]

_HUB_HELP = "A repository: hf:OWNER/NAME[@REVISION][/FOLDER]."

Repository = Annotated[str, typer.Argument(metavar="hf:OWNER/NAME", help=_HUB_HELP, show_default=False)]


def push(
    context: typer.Context,
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="An edit, key statistics, or a trained editor.", show_default=False)
    ],
    repository: Repository,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="The model on the hub that it belongs to, for the card.",
            show_default="as the result of `kecore edit` says",
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Everybody may read it; a new repository is private otherwise.")
    ] = False,
    message: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Message of the commit.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the card that is there.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Share an edit, key statistics or a trained editor on the Hugging Face hub.

    One commit brings the file, its result, and a model card: facts, method, settings, scores with their protocol, and
    how to load it. Log in with `hf auth login` first. What others need is the reference hf:OWNER/NAME.
    """
    screen = Screen.of(context)
    from kecore.sharing import push as push_file

    with screen.stage("push", f"sending {path} to {repository}"):
        pushed = push_file(
            path, repository, base_model=base_model, private=not public, message=message, replace_card=force
        )
    fields = {
        "shared": str(pushed.reference),
        "page": pushed.url,
        "files": ", ".join(pushed.files),
        "readers": "its owner" if pushed.private else "everybody",
    }
    if pushed.kept_card:
        fields["card"] = "the one that was there; --force replaces it"
    screen.show(make_fields(fields))
    screen.finish(
        {
            "repository": pushed.reference.repository,
            "commit": pushed.reference.revision,
            "url": pushed.url,
            "files": pushed.files,
            "private": pushed.private,
            "kept_card": pushed.kept_card,
            "warnings": screen.warnings,
        }
    )


def pull(context: typer.Context, repository: Repository, out: options.Out, as_json: options.AsJson = False) -> None:
    """Fetch an edit, key statistics or a trained editor from the hub.

    It is pinned to a commit and checked; hub.json says which. Commands also take hf:OWNER/NAME itself, wherever they
    take a path of such a file.
    """
    screen = Screen.of(context)
    from kecore.files import check_new_folder
    from kecore.sharing import ORIGIN
    from kecore.sharing import pull as pull_file

    check_new_folder(out)
    with screen.stage("pull", f"fetching {repository}"):
        pulled = pull_file(repository, out)
    size = format_bytes(pulled.file.stat().st_size)
    screen.show(
        make_fields(
            {
                pulled.shared.noun: f"{pulled.file} ({size})",
                "from": str(pulled.reference),
                "sha256": pulled.sha256,
                "origin": str(out / ORIGIN),
            }
        )
    )
    screen.commands("Next", f"kecore inspect {quote(str(out))}")
    screen.finish(
        {
            "kind": pulled.shared.noun,
            "path": pulled.file,
            "repository": pulled.reference.repository,
            "commit": pulled.reference.revision,
            "sha256": pulled.sha256,
            "warnings": screen.warnings,
        }
    )
