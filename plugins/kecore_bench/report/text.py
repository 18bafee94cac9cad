"""Tables as text: for a terminal, Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kecore.evaluate.columns import described
from kecore.evaluate.result import Score
from kecore_bench.report.gaps import gap_notes
from kecore_bench.report.papers import PaperRow, citations, lines
from kecore_bench.report.results import Result, Row, Table, versions

if TYPE_CHECKING:
    from rich.table import Table as RichTable

__all__ = [
    "COSTS",
    "INTERVALS",
    "cells",
    "conditions",
    "costs",
    "csv_scores",
    "figure",
    "further_rows",
    "heads",
    "latex",
    "markdown",
    "notes",
    "rich_notes",
    "rich_table",
    "shown",
]

_CSV = (
    "model", "data", "records", "protocol", "moment", "method", "metric", "value", "low", "high", "n",
    "probes", "source",
)  # fmt: skip

COSTS = ("s/fact", "KiB/fact", "+ms/token", "peak GiB")
"""Headings of what an edit costs."""

INTERVALS = (
    "Intervals are of 95 %, of the mean over records: they speak of the choice of records, not of other seeds. Those "
    "of shares, and of whatever has two bounds, are Wilson's, for fractions with the effective number of records; "
    "others (perplexity, KL, fluency) are the normal approximation."
)
"""How intervals are taken; docs/metrics.md has the formula."""

_FIRST = (
    "edit_success", "paraphrase_success", "neighbourhood_success", "score", "strict_accuracy", "free_generation",
    "neighbourhood_stability", "locality", "portability",
)  # fmt: skip
"""What a narrow terminal shows, as far as it has room, the first ones first."""


def heads(table: Table) -> list[str]:
    """What stands above the columns."""
    return ["method", *table.columns.values(), *COSTS]


def costs(result: Result) -> list[str | None]:
    """What a run's edits cost, in the order of :data:`COSTS`; None where it is not known."""
    size, latency, memory = result.bytes_per_fact, result.latency, result.peak_memory
    return [
        None if result.seconds is None else f"{result.seconds:.2f}",
        None if size is None else f"{size / 2**10:.1f}",
        None if latency is None else f"{1000 * latency['added']:+.1f}",
        None if memory is None else f"{memory / 2**30:.2f}",
    ]


def figure(value: float) -> str:
    """A number with three decimals, of large ones with fewer."""
    return f"{value:.{3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0}f}"


def shown(score: Score) -> str:
    """A score and its interval, which a single record has none of."""
    return figure(score.value) + (f" [{figure(score.ends[0])}, {figure(score.ends[1])}]" if score.ends else "")


def _two_lines(score: Score) -> str:
    return shown(score).replace(" ", "\n", 1)


def _value(score: Score) -> str:
    return figure(score.value)


def cells(table: Table, row: Row | PaperRow, show: Callable[[Score], str] = shown, empty: str = "-") -> list[str]:
    """A line of a table: scores with their intervals, which papers rarely give, and costs."""
    if isinstance(row, PaperRow):
        return [
            row.label,
            *(f"{row.scores[key]:.3f}" if key in row.scores else empty for key in table.columns),
            *(empty for _ in COSTS),
        ]
    found = [show(row.scores[key]) if key in row.scores else empty for key in table.columns]
    return [row.label, *found, *(cost or empty for cost in costs(row.result))]


def further_rows(
    table: Table, show: Callable[[Score], str] = shown, empty: str = "-"
) -> tuple[list[str], list[list[str]]]:
    """The scores beside the columns, a line each, a column a method: what heads it, and its lines."""
    rows = [row for row in table.rows if row.evaluation]
    found = [
        [described(table.described, key).name, *(show(r.scores[key]) if key in r.scores else empty for r in rows)]
        for key in table.further
    ]
    return ["score", *(row.label for row in rows)], found


def notes(table: Table) -> list[str]:
    """Where a table's rows of papers come from, and what is missing of it: failures, records, and their probes."""
    found = citations(table) + [f"{row.label}: {row.note}" for row in table.rows if row.note]
    found += gap_notes(table)
    for row in table.rows:
        if row.result.warnings:
            more = f" (and {len(row.result.warnings) - 1} more)" if len(row.result.warnings) > 1 else ""
            found.append(f"{row.label} warned: {row.result.warnings[0]}{more}")
    return found


def rich_table(table: Table, width: int) -> RichTable:
    """The table for a terminal of so many columns: narrow ones show the first scores, wide ones intervals too."""
    # An interval has a line of its own, or few terminals would be wide enough.
    made = _made(table, _two_lines)
    if _fits(made, width):
        return made
    keys = [key for key in _FIRST if key in table.columns]
    while True:
        short = Table(table.rows, table.moment, {key: name for key, name in table.columns.items() if key in keys})
        made = _made(short, _value, priced=1, stacked=True)
        if _fits(made, width) or len(keys) < 2:
            return made
        keys.pop()


def _made(table: Table, show: Callable[[Score], str], priced: int = len(COSTS), stacked: bool = False) -> RichTable:
    """All columns of scores, and the first so many of costs; headings with a line for each word where stacked."""
    from kecore.cli.console import make_table

    count = 1 + len(table.columns) + priced
    rows = [cells(table, row, show)[:count] for row in lines(table)]
    headings = [head.replace(" ", "\n") if stacked else head for head in heads(table)[:count]]
    return make_table(*headings, rows=rows, title=table.title, right=range(1, count))


def _fits(made: RichTable, width: int) -> bool:
    """Whether a terminal of so many columns shows the table without breaking a word.

    Names of methods get more lines where that is enough, by a width of their own: rich takes width from columns in an
    order of its own, and breaks words of one where another has room.
    """
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(width=10_000)
    excess = Measurement.get(console, console.options, made).maximum - width
    if excess > 0:
        first = made.columns[0]
        names = [Measurement.get(console, console.options, cell) for cell in (first.header, *first.cells)]
        room = max(name.maximum for name in names) - excess
        if room < max(name.minimum for name in names):
            return False
        first.width = room
    return True


def rich_notes(table: Table) -> list[str]:
    """The notes for a terminal."""
    from rich.markup import escape

    return [escape(line) for line in notes(table)]


def markdown(tables: Sequence[Table], results: Sequence[Result]) -> str:
    """All tables and their conditions as Markdown."""
    parts: list[str] = []
    for table in tables:
        parts.append(
            "\n".join([f"**{table.title}**", "", *_table(heads(table), [cells(table, row) for row in lines(table)])])
        )
        if table.further:
            parts.append("\n".join(["Further scores:", "", *_table(*further_rows(table))]))
        parts += ["\n".join(f"- {line}" for line in notes(table))] if notes(table) else []
    parts.append("\n".join(f"- {line}" for line in conditions(results)))
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_line(head), _line(["---", *["---:"] * (len(head) - 1)]), *map(_line, rows)]


def _line(values: Iterable[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def conditions(results: Sequence[Result]) -> list[str]:
    """Under what conditions the numbers were taken."""
    protocol = results[0].protocol
    data = dict.fromkeys((r.spec.data["name"], r.spec.data["sha256"][:12], r.spec.data["format"]) for r in results)
    texts = dict.fromkeys(_statistics(r.spec.statistics) for r in results if r.spec.statistics)
    return [
        f"Protocol {protocol.hash()}: {protocol.describe()}.",
        INTERVALS,
        *(f"Data: {name} (sha256 {digest}, layout {layout})." for name, digest, layout in data),
        *(f"Model: {text}." for text in dict.fromkeys(map(_weights, results))),
        *(f"Key statistics: {text}." for text in texts),
        *(f"Versions: {text}." for text in versions(results, "versions")),
        *(f"Hardware: {text}." for text in versions(results, "hardware")),
        "Seconds are those of editing, without loading, statistics and scoring, on that machine as loaded as it was.",
        "KiB/fact: tensors and texts of the edits, over their facts; of a sequence those that act at its end.",
        "+ms/token: what edits add to a token of greedy text, once a run on the first prompts, reading them included; "
        "noise can make it negative.",
        "Peak memory is the process's during an edit, with the model, the program, and what earlier methods keep."
        if all(result.peak_is_the_edits for result in results)
        else "Peak memory is the process's since its start, scoring and earlier methods included.",
    ]


def _weights(result: Result) -> str:
    """What the model's weights were."""
    kind, count = result.made_on["base"].get("dtype", "unknown type"), result.made_on.get("parameters")
    return f"{result.model}, weights in {kind}{f', {count:,} parameters' if count else ''}"


def _statistics(source: Mapping[str, Any]) -> str:
    if "saved" in source:
        return f"those of {source['saved']}"
    tokens = f"{source['tokens']:,} tokens" if source["tokens"] else "20 tokens for each key column"
    return f"{tokens} of {', '.join(source['text']) or 'the Wikipedia sample that kecore ships'}"


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _tex_score(score: Score) -> str:
    """A score with the ends of its interval above and below, which takes less room than brackets."""
    if score.ends is None:
        return figure(score.value)
    low, high = map(figure, score.ends)
    return f"{figure(score.value)}^{{{high}}}_{{{low}}}"


def _tex_cells(values: Iterable[str]) -> str:
    first, *others = values
    # What holds an interval is mathematics, and holds nothing to be escaped.
    return " & ".join([_tex(first), *(f"${value}$" if "^{" in value else _tex(value) for value in others)]) + r" \\"


def latex(tables: Sequence[Table], results: Sequence[Result]) -> str:
    """All tables as LaTeX, for the packages booktabs and graphicx."""
    parts: list[str] = []
    for table in tables:
        protocol = table.first.protocol
        caption = f"{table.title}; protocol {protocol.hash()}: {protocol.describe()}. {_ENDS}"
        if table_notes := notes(table):
            caption += " " + "; ".join(note.rstrip(".") for note in table_notes) + "."
        rows = [cells(table, row, _tex_score, "--") for row in lines(table)]
        parts.append(_tex_table(heads(table), rows, caption))
        if table.further:
            head, rows = further_rows(table, _tex_score, "--")
            parts.append(_tex_table(head, rows, f"{table.title}: further scores. {_ENDS}"))
    return "\n\n".join([*parts, "\n".join(f"% {line}" for line in conditions(results))]) + "\n"


_ENDS = "Above and below: ends of 95 % confidence intervals over records."
_NARROW = 6
"""Columns of scores that a page holds at the size of its text; more are scaled down to its width."""


def _tex_table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    wide = len(head) - 1 > _NARROW
    tabular = [
        rf"\begin{{tabular}}{{@{{}}l{'r' * (len(head) - 1)}@{{}}}}",
        r"\toprule",
        " & ".join(map(_tex, head)) + r" \\",
        r"\midrule",
        *map(_tex_cells, rows),
        r"\bottomrule",
        r"\end{tabular}" + ("%" if wide else ""),
    ]
    if wide:
        tabular = [r"\setlength{\tabcolsep}{3pt}%", r"\resizebox{\linewidth}{!}{%", *tabular, "}"]
    return "\n".join([r"\begin{table}", r"\centering", rf"\caption{{{_tex(caption)}}}", *tabular, r"\end{table}"])


def csv_scores(tables: Sequence[Table]) -> str:
    """Every score and cost, one a line, with all digits; ``source`` tells those of papers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV)
    for table in tables:
        spec, protocol = table.first.spec, table.first.protocol
        start = [table.first.model, spec.data["name"], spec.size, protocol.hash(), table.moment]
        for row in table.rows:
            for key, score in row.scores.items():
                ends = score.ends or ("", "")
                writer.writerow([*start, row.label, key, score.value, *ends, score.records, score.probes, "kecore"])
            for key, value in _costs(row.result).items():
                if value is not None:
                    writer.writerow([*start, row.label, key, value, "", "", "", "", "kecore"])
        for row in lines(table):
            if isinstance(row, PaperRow):
                for key, value in row.scores.items():
                    count = row.paper.records or ""
                    writer.writerow([*start, row.method, key, value, "", "", count, "", row.paper.source])
    return text.getvalue()


def _costs(result: Result) -> dict[str, float | None]:
    """What edits cost, in seconds and bytes."""
    return {
        "seconds_per_fact": result.seconds,
        "bytes_per_fact": result.bytes_per_fact,
        "added_seconds_per_token": result.latency["added"] if result.latency else None,
        "peak_memory_bytes": result.peak_memory,
    }
