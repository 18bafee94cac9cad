"""Writing the files of a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kecore.api.errors import MissingDependencyError
from kecore.files import write_atomic
from kecore_bench.report.gaps import gaps, left_out
from kecore_bench.report.html import page
from kecore_bench.report.results import Result, results
from kecore_bench.report.table import Table, tables
from kecore_bench.report.text import csv_scores, latex, markdown
from kecore_bench.store import Store

__all__ = ["FORMATS", "write_report"]


def _json(tables: Sequence[Table], results: Sequence[Result]) -> str:
    """Return all tables as JSON, each with what is missing of it."""
    values: list[dict[str, Any]] = []
    for table in tables:
        missing = {"not_taken": [gap.to_json() for gap in gaps(table)], "left_out": left_out(table)}
        values.append({**table.to_json(), **missing})
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def _csv(tables: Sequence[Table], results: Sequence[Result]) -> str:
    return csv_scores(tables)


_TEXTS: Mapping[str, tuple[str, Callable[[Sequence[Table], Sequence[Result]], str]]] = {
    "html": ("index.html", page),
    "markdown": ("table.md", markdown),
    "latex": ("table.tex", latex),
    "csv": ("scores.csv", _csv),
    "json": ("tables.json", _json),
}

FORMATS = (*_TEXTS, "png")
"""What a report can be written as."""


def write_report(
    stores: Iterable[Store], out: Path, formats: Iterable[str] = FORMATS, *, optional: bool = False
) -> dict[str, list[Path]]:
    """Write a report.

    Args:
        stores: results of one protocol.
        out: directory for the files.
        formats: some of :data:`FORMATS`.
        optional: leave out what needs a package that is not installed.

    Returns:
        The files, by format.

    Raises:
        ProtocolMismatchError: the stores follow different protocols.
        ArtifactError: a store holds no results.
        MissingDependencyError: PNG was asked for without matplotlib.
        StorageError: a file cannot be written.
    """
    runs = results(*stores)
    run_tables = tables(runs)
    written: dict[str, list[Path]] = {}
    for name in formats:
        if name != "png":
            file, write = _TEXTS[name]
            written[name] = [_write_text(out / file, write(run_tables, runs))]
            continue
        from kecore_bench.report.plots import write_plots

        try:
            written[name] = write_plots(run_tables, runs, out)
        except MissingDependencyError:
            if not optional:
                raise
    return written


def _write_text(path: Path, text: str) -> Path:
    def write(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    return write_atomic(path, write)
