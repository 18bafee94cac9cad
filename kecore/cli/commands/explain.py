"""``kecore explain``: what an error means, and what to do about it."""

from __future__ import annotations

from typing import Annotated

import typer

from kecore.cli import options
from kecore.cli.console import Screen

__all__ = ["explain"]


def explain(
    context: typer.Context,
    error: Annotated[
        str,
        typer.Argument(metavar="ERROR", help="The class that a message ends with.", show_default=False),
    ],
    as_json: options.AsJson = False,
) -> None:
    """Explain an error: cause, triggers and what to do."""
    from rich.markdown import Markdown

    from kecore.api.pages import error_page, web_address

    screen = Screen.of(context)
    page = error_page(error)
    name = page.partition("\n")[0].removeprefix("# ")
    screen.show(Markdown(page))
    address = web_address(name)
    screen.finish({"error": name, "page": page, "address": address or None})
