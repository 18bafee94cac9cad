"""``kecore cache``: what kecore keeps, how large it is, and how to be rid of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from kecore.cli import options
from kecore.cli.console import Screen, format_bytes, make_fields, make_table
from kecore.cli.plugins import help_group

__all__ = ["cache"]

HOLDS: Mapping[str, str] = {
    "models": "models unpacked from .gguf files",
    "statistics": "key statistics by weights and text",
    "factors": "factors of key statistics",
    "spectrums": "eigenvectors of key statistics",
    "contexts": "context prefixes by model",
    "demo": "the edit of kecore demo",
}
"""What the folders of the cache hold; all of it is made again when it is asked for."""


@help_group("Find your way")
def cache(
    context: typer.Context,
    clear: Annotated[
        list[str] | None,
        typer.Option(metavar="FOLDER", help="Delete what this folder holds, or all (repeatable).", show_default=False),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what kecore keeps on this machine, and delete it.

    Everything there is made again when it is asked for, at the cost of the time that took.
    """
    screen = Screen.of(context)
    from kecore.cache import BOUND, cache_bound
    from kecore.files import cache_dir

    root, bound = cache_dir(), cache_bound()
    sizes = (
        {folder.name: _size(folder) for folder in sorted(root.iterdir()) if folder.is_dir()} if root.is_dir() else {}
    )
    freed = _clear(root, sizes, clear or [])
    screen.show(
        make_fields(
            {
                "cache": str(root),
                "to move it": "set KECORE_CACHE",
                "bound": f"{format_bytes(bound)}; what was used least recently goes first (set {BOUND})",
            }
        )
    )
    rows = [(name, HOLDS.get(name, ""), format_bytes(size)) for name, size in sizes.items()]
    rows.append(("all", "", format_bytes(sum(sizes.values()))))
    screen.show(make_table("folder", "holds", "size", rows=rows, right=(2,)))
    if clear:
        screen.show(f"deleted: {format_bytes(freed)}")
    screen.finish({"cache": root, "bytes": sizes, "bound": bound, "freed": freed})


def _size(folder: Path) -> int:
    """Return the bytes of all files of a folder; one that another process deletes meanwhile counts for nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def _clear(root: Path, sizes: dict[str, int], names: list[str]) -> int:
    """Delete folders of the cache, take them out of ``sizes``, and return the bytes that were freed.

    Raises:
        ConfigError: there is no such folder; nothing is deleted then.
    """
    import shutil

    from kecore.api.errors import ConfigError
    from kecore.files import explain_write_errors

    wanted = list(sizes) if "all" in names else names
    unknown = [name for name in wanted if name not in sizes]
    if unknown:
        raise ConfigError(f"the cache {root} has no folder '{unknown[0]}'; it has: {', '.join([*sizes, 'all'])}")
    freed = 0
    for name in dict.fromkeys(wanted):
        with explain_write_errors(root / name):
            shutil.rmtree(root / name)
        freed += sizes.pop(name)
    return freed
