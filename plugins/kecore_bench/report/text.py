"""Tables as text: for a terminal, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kecore.evaluate.columns import described
from kecore.evaluate.result import Score
from kecore_bench.report.ages import age_rows, aged
from kecore_bench.report.gaps import gap_notes
from kecore_bench.report.growth import HEADS, growth_lines, growth_rows
from kecore_bench.report.papers import PaperRow, citations, lines
from kecore_bench.report.results import Result, versions
from kecore_bench.report.table import Row, Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable

__all__ = [
    "FIRST",
    "INTERVALS",
    "cells",
    "conditions",
    "csv_scores",
    "figure",
    "further_rows",
    "heads",
    "markdown",
    "markdown_list",
    "markdown_table",
    "missing_notes",
    "notes",
    "rich_notes",
    "rich_table",
    "shown",
    "warning_notes",
]

_CSV = (
    "model", "data", "records", "protocol", "seed", "moment", "method", "metric", "value", "low", "high", "n",
    "probes", "source",
)  # fmt: skip

INTERVALS = (
    "Intervals are of 95 %, of the mean over records: they speak of the choice of records, not of other seeds. Those "
    "of shares, and of whatever has two bounds, are Wilson's, for fractions with the effective number of records; "
    "others (perplexity, KL, fluency) are the normal approximation."
)
"""How intervals are taken; docs/metrics.md has the formula."""

FIRST = (
    "edit_success", "paraphrase_success", "neighbourhood_success", "score", "strict_accuracy", "free_generation",
    "neighbourhood_stability", "locality", "portability",
)  # fmt: skip
"""The most telling scores, the first ones first: what narrow tables show, as far as there is room."""


def heads(table: Table) -> list[str]:
    """Return the headings of the columns."""
    return ["method", *table.columns.values(), *(cost.heading for cost in table.costs)]


def figure(value: float) -> str:
    """Write a number with three decimals, a large one with fewer."""
    if abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def shown(score: Score) -> str:
    """Write a score with its interval, which a score of a single record has not."""
    if score.ends is None:
        return figure(score.value)
    low, high = score.ends
    return f"{figure(score.value)} [{figure(low)}, {figure(high)}]"


def _in_two_lines(score: Score) -> str:
    return shown(score).replace(" ", "\n", 1)


def _without_interval(score: Score) -> str:
    return figure(score.value)


def cells(table: Table, row: Row | PaperRow, show: Callable[[Score], str] = shown, empty: str = "-") -> list[str]:
    """Return a line of a table: the label, scores with their intervals (which papers rarely give), and costs."""
    if isinstance(row, PaperRow):
        printed = [f"{row.scores[key]:.3f}" if key in row.scores else empty for key in table.columns]
        return [row.label, *printed, *([empty] * len(table.costs))]
    scores = [show(row.scores[key]) if key in row.scores else empty for key in table.columns]
    return [row.label, *scores, *(cost.text(row.result) or empty for cost in table.costs)]


def further_rows(
    table: Table, show: Callable[[Score], str] = shown, empty: str = "-"
) -> tuple[list[str], list[list[str]]]:
    """Return headings and lines of the table of all other scores: a line for each score, a column for each method."""
    rows = [row for row in table.rows if row.evaluation]
    score_lines: list[list[str]] = []
    for key in table.further:
        values = [show(row.scores[key]) if key in row.scores else empty for row in rows]
        score_lines.append([described(table.described, key).name, *values])
    return ["score", *(row.label for row in rows)], score_lines


def notes(table: Table) -> list[str]:
    """Say where a table's rows of papers come from, and what is missing of it: failures, records, and their probes."""
    return [*citations(table), *missing_notes(table), *warning_notes(table)]


def missing_notes(table: Table) -> list[str]:
    """Say what is missing of a table: failures, records, and their probes."""
    return [f"{row.label}: {row.note}" for row in table.rows if row.note] + gap_notes(table)


def warning_notes(table: Table) -> list[str]:
    """Say what editing warned of."""
    texts: list[str] = []
    for row in table.rows:
        warnings = row.result.warnings
        if warnings:
            more = f" (and {len(warnings) - 1} more)" if len(warnings) > 1 else ""
            texts.append(f"{row.label} warned: {warnings[0]}{more}")
    return texts


def rich_table(table: Table, width: int) -> RichTable:
    """Return the table for a terminal of so many columns: narrow ones show some scores, wide ones intervals too."""
    # An interval has a line of its own, or few terminals would be wide enough.
    full = _console_table(table, heads(table), _in_two_lines)
    if _fits(full, width):
        return full
    keys = [key for key in FIRST if key in table.columns]
    while True:
        narrowed = replace(table, keys=tuple(keys))
        columns = 1 + len(narrowed.columns) + 1  # the method, scores, and the first of the costs
        headings = [heading.replace(" ", "\n") for heading in heads(narrowed)[:columns]]
        short = _console_table(narrowed, headings, _without_interval)
        if _fits(short, width) or len(keys) < 2:
            return short
        keys.pop()


def _console_table(table: Table, headings: Sequence[str], show: Callable[[Score], str]) -> RichTable:
    """Return the first columns of a table, as many as there are headings."""
    from kecore.cli.console import make_table

    count = len(headings)
    rows = [cells(table, row, show)[:count] for row in lines(table)]
    return make_table(*headings, rows=rows, title=table.title, right=range(1, count))


def _fits(table: RichTable, width: int) -> bool:
    """Return whether a terminal of so many columns shows the table without breaking a word.

    Names of methods get more lines where that is enough, by a width of their own: rich takes width from columns in an
    order of its own, and breaks words of one where another has room.
    """
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(width=10_000)
    excess = Measurement.get(console, console.options, table).maximum - width
    if excess <= 0:
        return True
    first = table.columns[0]
    names = [Measurement.get(console, console.options, cell) for cell in (first.header, *first.cells)]
    name_width = max(name.maximum for name in names) - excess
    if name_width < max(name.minimum for name in names):
        return False
    first.width = name_width
    return True


def rich_notes(table: Table) -> list[str]:
    """Return the notes for a terminal."""
    from rich.markup import escape

    return [escape(line) for line in notes(table)]


def markdown(tables: Sequence[Table], results: Sequence[Result]) -> str:
    """Return all tables and their conditions as Markdown."""
    blocks: list[str] = []
    for table in tables:
        rows = [cells(table, row) for row in lines(table)]
        blocks += [f"**{table.title}**", markdown_table(heads(table), rows)]
        if table.further:
            blocks += ["Further scores:", markdown_table(*further_rows(table))]
        table_notes = notes(table)
        if table_notes:
            blocks.append(markdown_list(table_notes))
    growth = growth_rows(growth_lines(results))
    if growth:
        blocks += ["As the sequence grows:", markdown_table(HEADS, growth)]
    for result in results:
        scores = aged(result, "edit_success") if result.edits and result.protocol.retention else []
        if scores:
            title = f"{result.label}: edit success of the facts of each stretch, with how many were asked:"
            blocks += [title, markdown_table(*age_rows(scores))]
    blocks.append(markdown_list(conditions(results)))
    return "\n\n".join(blocks) + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a table whose first columns, ``left`` of them, are flush left and the others flush right."""
    alignment = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(_markdown_row(values) for values in (head, alignment, *rows))


def _markdown_row(values: Iterable[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def markdown_list(items: Iterable[str]) -> str:
    """Return a list."""
    return "\n".join(f"- {item}" for item in items)


def conditions(results: Sequence[Result]) -> list[str]:
    """Say under what conditions the numbers were taken."""
    texts = [f"Protocol {result.protocol.hash()}: {result.protocol.describe()}." for result in results]
    texts.append(INTERVALS)
    texts += [f"Data: {_describe_data(result.spec.data)}." for result in results]
    texts += [f"Model: {_describe_weights(result)}." for result in results]
    for result in results:
        if result.spec.statistics:
            texts.append(f"Key statistics: {_describe_statistics(result.spec.statistics)}.")
    texts += [f"Versions: {text}." for text in versions(results, "versions")]
    texts += [f"Hardware: {text}." for text in versions(results, "hardware")]
    texts += [
        "Seconds are those of editing, without loading, statistics and scoring, on that machine as loaded as it was.",
        "KiB/fact: tensors and texts of the edits, over their facts; of a sequence those that act at its end.",
        "+ms/token: what edits add to a token of greedy text, once a run on the first prompts, reading them included; "
        "noise can make it negative.",
    ]
    if all(result.peak_is_the_edits for result in results):
        texts.append(
            "Peak memory is the process's during an edit, with the model, the program, and what earlier methods keep."
        )
    else:
        texts.append("Peak memory is the process's since its start, scoring and earlier methods included.")
    return list(dict.fromkeys(texts))  # what holds for several runs is said once


def _describe_data(data: Mapping[str, Any]) -> str:
    return f"{data['name']} (sha256 {data['sha256'][:12]}, layout {data['format']})"


def _describe_weights(result: Result) -> str:
    text = f"{result.model}, weights in {result.made_on['base'].get('dtype', 'unknown type')}"
    count = result.made_on.get("parameters")
    return f"{text}, {count:,} parameters" if count else text


def _describe_statistics(source: Mapping[str, Any]) -> str:
    if "saved" in source:
        return f"those of {source['saved']}"
    tokens = f"{source['tokens']:,} tokens" if source["tokens"] else "20 tokens for each key column"
    return f"{tokens} of {', '.join(source['text']) or 'the Wikipedia sample that kecore ships'}"


def csv_scores(tables: Sequence[Table]) -> str:
    """Return every score and cost, or those that were chosen, one a line, with all digits.

    ``source`` tells the figures of papers.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV)
    for table in tables:
        spec, protocol = table.first.spec, table.first.protocol
        start = [table.first.model, spec.data["name"], spec.size, protocol.hash(), protocol.seed, table.moment]
        paper_rows = [row for row in lines(table) if isinstance(row, PaperRow)]
        for row in table.rows:
            writer.writerows([*start, *values] for values in _csv_of_run(table, row))
        for row in paper_rows:
            writer.writerows([*start, *values] for values in _csv_of_paper(table, row))
    return text.getvalue()


def _csv_of_run(table: Table, row: Row) -> Iterator[list[Any]]:
    for key, score in row.scores.items():
        if table.shows(key):
            low, high = score.ends or ("", "")
            yield [row.label, key, score.value, low, high, score.records, score.probes, "kecore"]
    for cost in table.costs:
        value = cost.read(row.result)
        if value is not None:
            yield [row.label, cost.key, value, "", "", "", "", "kecore"]


def _csv_of_paper(table: Table, row: PaperRow) -> Iterator[list[Any]]:
    for key, value in row.scores.items():
        if table.shows(key):
            yield [row.method, key, value, "", "", row.paper.records or "", "", row.paper.source]
