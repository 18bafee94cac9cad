"""Writing the files of a report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kecore.api.errors import MissingDependencyError
from kecore.files import write_atomic
from kecore_bench.report.choice import EVERYTHING, Choice
from kecore_bench.report.gaps import gaps, left_out
from kecore_bench.report.html import page
from kecore_bench.report.joined import join
from kecore_bench.report.joined_text import NO_WORDS, Words, joined_latex, joined_markdown
from kecore_bench.report.results import Result, results
from kecore_bench.report.table import Table, tables
from kecore_bench.report.text import csv_scores, markdown
from kecore_bench.store import Store

__all__ = ["FIGURES", "FORMATS", "write_report"]

_TEXTS = {
    "html": "index.html",
    "markdown": "table.md",
    "latex": "table.tex",
    "csv": "scores.csv",
    "json": "tables.json",
}
"""The file of each format that is text."""

FIGURES = ("png", "pdf", "svg")
"""Formats of the figures, a file each."""

FORMATS = (*_TEXTS, *FIGURES)
"""What a report can be written as."""


def write_report(
    stores: Iterable[Store],
    out: Path,
    formats: Iterable[str] = FORMATS,
    *,
    optional: bool = False,
    choice: Choice = EVERYTHING,
    words: Words = NO_WORDS,
) -> dict[str, list[Path]]:
    """Write a report.

    Args:
        stores: results of one protocol, or of several that differ by nothing but the seed.
        out: directory for the files.
        formats: some of :data:`FORMATS`.
        optional: leave out what needs a package that is not installed.
        choice: rows and columns; by default all that a format shows.
        words: caption and label of the LaTeX table.

    Returns:
        The files, by format.

    Raises:
        ProtocolMismatchError: the stores follow protocols that differ by more than the seed.
        ArtifactError: a store holds no results.
        ConfigError: a chosen row or column is not there.
        MissingDependencyError: figures were asked for without matplotlib.
        StorageError: a file cannot be written.
    """
    runs = choice.of_runs(results(*stores))
    run_tables = choice.of_tables(tables(runs))
    written: dict[str, list[Path]] = {}
    figure_formats: list[str] = []
    for name in formats:
        if name in FIGURES:
            figure_formats.append(name)
            continue
        text = _text(name, run_tables, runs, choice, words)
        written[name] = [_write_text(out / _TEXTS[name], text)]
    if figure_formats:
        from kecore_bench.report.plots import write_plots

        try:
            written |= write_plots(run_tables, runs, out, figure_formats)
        except MissingDependencyError:
            if not optional:
                raise
    return written


def _text(name: str, run_tables: Sequence[Table], runs: Sequence[Result], choice: Choice, words: Words) -> str:
    """Return a report as text of some format."""
    if name == "html":
        return page(run_tables, runs)
    if name == "csv":
        return csv_scores(run_tables)
    if name == "json":
        return _json(run_tables)
    if name == "latex":
        return joined_latex(join(run_tables), runs, words)
    # A chosen table is one for readers; without a choice the file is the record of all scores.
    return joined_markdown(join(run_tables), runs) if choice else markdown(run_tables, runs)


def _json(tables: Sequence[Table]) -> str:
    """Return all tables as JSON, each with what is missing of it."""
    values: list[dict[str, Any]] = []
    for table in tables:
        missing = {"not_taken": [gap.to_json() for gap in gaps(table)], "left_out": left_out(table)}
        values.append({**table.to_json(), **missing})
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def _write_text(path: Path, text: str) -> Path:
    def write(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    return write_atomic(path, write)
