"""Tables as text: for a terminal, Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kecore.report.papers import PaperRow, citations, lines
from kecore.report.results import Result, Row, Table, versions

if TYPE_CHECKING:
    from rich.table import Table as RichTable

__all__ = ["cells", "conditions", "csv_scores", "heads", "latex", "markdown", "notes", "rich_notes", "rich_table"]

_CSV = (
    "model", "data", "records", "protocol", "moment", "method", "metric", "value", "half_width", "n", "probes",
    "source",
)  # fmt: skip

_WIDE = 130
"""Columns of a terminal that shows everything."""

_FIRST = {
    "edit_success", "paraphrase_success", "neighbourhood_success", "score", "strict_accuracy", "free_generation",
    "neighbourhood_stability", "portability", "locality",
}  # fmt: skip


def heads(table: Table) -> list[str]:
    """What stands above the columns."""
    return ["method", *table.columns.values(), "s/fact", "peak GiB"]


def cells(table: Table, row: Row | PaperRow, sign: str = "±", empty: str = "-") -> list[str]:
    """A line of a table: scores with the half-width of their 95 % interval, which papers rarely give."""
    if isinstance(row, PaperRow):
        return [
            row.label,
            *(f"{row.scores[key]:.3f}" if key in row.scores else empty for key in table.columns),
            empty,
            empty,
        ]
    result = row.result
    found = [row.label]
    for key in table.columns:
        score = row.scores.get(key)
        if score is None:
            found.append(empty)
        else:
            half = f" {sign} {score.half_width:.3f}" if score.half_width else ""
            found.append(f"{score.value:.3f}{half}")
    found.append(empty if result.seconds is None else f"{result.seconds:.2f}")
    found.append(empty if result.peak_memory is None else f"{result.peak_memory / 2**30:.2f}")
    return found


def notes(table: Table) -> list[str]:
    """Where a table's rows of papers come from, and what is missing of it: failures, records, and their probes."""
    found = citations(table) + [f"{row.label}: {row.note}" for row in table.rows if row.note]
    left_out = max(row.result.made_on["left_out"] for row in table.rows)
    if left_out:
        found.append(f"{left_out} records of the file could not be represented and were left out")
    rows = [row.evaluation for row in table.rows if row.evaluation]
    for key, head in table.columns.items():
        missing = max((evaluation.skipped.get(key, 0) for evaluation in rows), default=0)
        if missing:
            found.append(f"{head}: {missing} records have no probe for it")
    for row in table.rows:
        if row.result.warnings:
            more = f" (and {len(row.result.warnings) - 1} more)" if len(row.result.warnings) > 1 else ""
            found.append(f"{row.label} warned: {row.result.warnings[0]}{more}")
    return found


def rich_table(table: Table, width: int) -> RichTable:
    """The table for a terminal of so many columns: narrow ones show the first scores, wide ones intervals too."""
    from kecore.cli.console import table as made

    keys, sign = list(table.columns), "±"
    if width < _WIDE:
        keys, sign = [key for key in keys if key in _FIRST], ""
    short = Table(table.rows, table.moment, {key: table.columns[key] for key in keys})
    head = heads(short)
    # An interval has a line of its own, or few terminals would be wide enough.
    rows = [[cell.replace(" ± ", f"\n{sign}") for cell in cells(short, row)] for row in lines(table)]
    if not sign:
        head, rows = head[:-1], [[cell.partition("\n")[0] for cell in row[:-1]] for row in rows]
    return made(*head, rows=rows, title=table.title, right=range(1, len(head)))


def rich_notes(table: Table) -> list[str]:
    """The notes for a terminal."""
    from rich.markup import escape

    return [escape(line) for line in notes(table)]


def markdown(tables: Sequence[Table], results: Sequence[Result]) -> str:
    """All tables and their conditions as Markdown."""
    parts: list[str] = []
    for table in tables:
        head = heads(table)
        text = [f"**{table.title}**", "", _line(head), _line(["---", *["---:"] * (len(head) - 1)])]
        text += [_line(cells(table, row)) for row in lines(table)]
        parts.append("\n".join(text))
        parts += ["\n".join(f"- {line}" for line in notes(table))] if notes(table) else []
    parts.append("\n".join(f"- {line}" for line in conditions(results)))
    return "\n\n".join(parts) + "\n"


def _line(values: Iterable[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def conditions(results: Sequence[Result]) -> list[str]:
    """Under what conditions the numbers were taken."""
    protocol = results[0].protocol
    data = dict.fromkeys((r.spec.data["name"], r.spec.data["sha256"][:12], r.spec.data["format"]) for r in results)
    texts = dict.fromkeys(_statistics(r.spec.statistics) for r in results if r.spec.statistics)
    return [
        f"Protocol {protocol.hash()}: {protocol.describe()}.",
        "± is half of the 95 % confidence interval of the mean over records (normal approximation); it speaks of the "
        "choice of records, not of other seeds.",
        *(f"Data: {name} (sha256 {digest}, layout {layout})." for name, digest, layout in data),
        *(f"Key statistics: {text}." for text in texts),
        *(f"Versions: {text}." for text in versions(results, "versions")),
        *(f"Hardware: {text}." for text in versions(results, "hardware")),
        "Seconds are those of editing, without loading, statistics and scoring, on that machine as loaded as it was.",
        "Peak memory is the process's since its start, scoring and earlier methods included.",
    ]


def _statistics(source: Mapping[str, Any]) -> str:
    if "saved" in source:
        return f"those of {source['saved']}"
    tokens = f"{source['tokens']:,} tokens" if source["tokens"] else "20 tokens for each key column"
    return f"{tokens} of {', '.join(source['text']) or 'the Wikipedia sample that kecore ships'}"


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def latex(tables: Sequence[Table], results: Sequence[Result]) -> str:
    """All tables as LaTeX, for the package booktabs."""
    parts: list[str] = []
    for table in tables:
        head = heads(table)
        rows = [" & ".join(map(_tex, cells(table, row, empty="--"))) + r" \\" for row in lines(table)]
        protocol = table.first.protocol
        caption = f"{table.title}; protocol {protocol.hash()}: {protocol.describe()}."
        if table_notes := notes(table):
            caption += " " + "; ".join(note.rstrip(".") for note in table_notes) + "."
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    r"\centering",
                    rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
                    r"\toprule",
                    " & ".join(map(_tex, head)) + r" \\",
                    r"\midrule",
                    *rows,
                    r"\bottomrule",
                    r"\end{tabular}",
                    rf"\caption{{{_tex(caption)}}}",
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join([*parts, "\n".join(f"% {line}" for line in conditions(results))]) + "\n"


def csv_scores(tables: Sequence[Table]) -> str:
    """Every score, one a line, with all digits; ``source`` tells those of papers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV)
    for table in tables:
        spec, protocol = table.first.spec, table.first.protocol
        start = [table.first.model, spec.data["name"], spec.size, protocol.hash(), table.moment]
        for row in table.rows:
            for key, score in row.scores.items():
                half = "" if score.half_width is None else score.half_width
                writer.writerow([*start, row.label, key, score.value, half, score.records, score.probes, "kecore"])
        for row in lines(table):
            if isinstance(row, PaperRow):
                for key, value in row.scores.items():
                    count = row.paper.records or ""
                    writer.writerow([*start, row.method, key, value, "", count, "", row.paper.source])
    return text.getvalue()
