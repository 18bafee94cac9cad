"""``--hparams FILE``: the file of another tool in place of a method's name and fields, and what becomes of its keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kecore.cli.console import Screen, make_table, to_plain_json

if TYPE_CHECKING:
    from kecore.api.hparams import Hparams, HparamsRow, Outcome

__all__ = ["show_hparams", "take_hparams"]

_TOLD: tuple[tuple[str, tuple[Outcome, ...]], ...] = (
    ("as here anyway", ("same",)),
    ("said elsewhere", ("elsewhere",)),
    ("without effect there", ("unused",)),
)
"""Outcomes of which a line names the keys; every other has a row."""


def take_hparams(
    screen: Screen, context: typer.Context, path: Path | None, *, method: str, preset: str | None
) -> Hparams | None:
    """Read and show the file of ``--hparams``; None where the option was not given.

    Args:
        screen: shows it.
        context: of the command, which tells whether ``--method`` was given.
        path: the file.
        method: what ``--method`` is; its default gives way to the file's.
        preset: what ``--preset`` is, which cannot stand beside it.

    Raises:
        DataFormatError: it is no such file.
        ConfigError: it is for another method, or holds a value that is not possible.
    """
    if path is None:
        return None
    if preset is not None:
        raise typer.BadParameter("give --preset or --hparams; both set the same fields")
    from kecore.hparams import read_hparams

    source = context.get_parameter_source("method")
    is_default = source is not None and source.name == "DEFAULT"
    hparams = read_hparams(path, None if is_default else method)
    show_hparams(screen, hparams)
    return hparams


def show_hparams(screen: Screen, hparams: Hparams) -> None:
    """Show what a file sets, what differs and what has no counterpart."""
    rows = [_cells(row) for row in hparams.with_outcome("taken", "differs", "missing", "unknown")]
    title = f"{hparams.path}: {hparams.algorithm}, here {hparams.method}"
    screen.show(make_table("in the file", "here", "remark", rows=rows, title=title))
    for words, outcomes in _TOLD:
        if told := hparams.with_outcome(*outcomes):
            screen.show(f"[dim]{words}: {', '.join(_key(row, outcomes) for row in told)}[/]")
    if hparams.implied:
        screen.show(f"[dim]implied by {hparams.algorithm}'s released code: {_fields(hparams.implied)}[/]")
    if unknown := hparams.with_outcome("unknown"):
        screen.warn(f"{hparams.path}: no key of {hparams.algorithm} that is known: {_keys(unknown)}")


def _cells(row: HparamsRow) -> tuple[str, str, str]:
    here = _fields(row.fields) or {"missing": "nothing", "unknown": "?"}.get(row.outcome, "otherwise")
    remark = row.remark
    if row.outcome == "differs":
        remark = f"differs: {remark}"
    return f"{row.key}={_value(row.value)}", here, remark


def _key(row: HparamsRow, outcomes: Sequence[Outcome]) -> str:
    """Name a key, and where its matter is said if that is the question."""
    return f"{row.key} ({row.remark})" if outcomes == ("elsewhere",) else row.key


def _keys(rows: Sequence[HparamsRow]) -> str:
    return ", ".join(row.key for row in rows)


def _fields(fields: Any) -> str:
    return ", ".join(f"{name}={_value(value)}" for name, value in fields.items())


def _value(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(to_plain_json(value))
