"""The joined table as LaTeX and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kecore_bench.report.joined import Cell, Column, Group, JoinedTable, Line
from kecore_bench.report.marks import LEGEND
from kecore_bench.report.results import Result
from kecore_bench.report.text import conditions, markdown_list, markdown_table, warning_notes

__all__ = ["NO_WORDS", "Words", "joined_latex", "joined_markdown"]

_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}",
}  # fmt: skip
_NARROW = 7
"""Columns of values that one column of text holds; wider tables reach over both columns of a page."""


@dataclass(frozen=True)
class Words:
    r"""What a paper calls its table.

    Args:
        caption: the caption, as LaTeX; by default a description.
        label: what ``\ref`` takes; by default ``tab:`` and the names of models and data sets.
    """

    caption: str = ""
    label: str = ""


NO_WORDS = Words()
"""A description as the caption, and a label of names."""


def joined_latex(table: JoinedTable, results: Sequence[Result], words: Words = NO_WORDS) -> str:
    """Return the table as LaTeX, for the package booktabs.

    Args:
        table: the table.
        results: the runs behind it, whose conditions stand below it as comments.
        words: caption and label.
    """
    is_wide = len(table.columns) > _NARROW
    environment = "table*" if is_wide else "table"
    caption = words.caption or _caption(table)
    label = words.label or f"tab:{_slug([*table.models, *table.sets])}"
    alignment = "l" + "r" * len(table.columns)
    parts = [
        "% \\usepackage{booktabs}",
        rf"\begin{{{environment}}}",
        r"\centering",
        rf"\caption{{{caption}}}",
        rf"\label{{{label}}}",
        r"\renewcommand{\arraystretch}{1.2}",  # the ends of intervals stand above and below the line
        *([r"\small", r"\setlength{\tabcolsep}{4pt}"] if is_wide else []),
        rf"\begin{{tabular}}{{@{{}}{alignment}@{{}}}}",
        r"\toprule",
        *_latex_head(table.groups),
        r"\midrule",
        *_latex_body(table),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    if table.notes:
        text = " ".join(_tex(f"{note.rstrip('.')}.") for note in table.notes)
        parts += ["", rf"\smallskip\parbox{{\linewidth}}{{\footnotesize {text}}}"]
    parts.append(rf"\end{{{environment}}}")
    comments = conditions(results)
    for source in table.tables:
        comments += warning_notes(source)
    parts += ["", *(f"% {line}" for line in dict.fromkeys(" ".join(text.split()) for text in comments))]
    return "\n".join(parts) + "\n"


def _caption(table: JoinedTable) -> str:
    """Return a caption that says what the table is of, and how it is to be read."""
    hashes = dict.fromkeys(source.first.protocol.hash() for source in table.tables)
    sentences = [f"Knowledge editing of {table.subject}: {table.spread}.", LEGEND]
    if any(column.lower for column in table.columns):
        sentences.append("Lower is better where an arrow points down.")
    sentences.append(f"Protocol {', '.join(hashes)}.")
    return _tex(" ".join(sentences))


def _slug(names: Sequence[str]) -> str:
    """Return names as a part of a label."""
    return re.sub("[^a-z0-9]+", "-", " ".join(names).casefold()).strip("-")


def _tex(text: str) -> str:
    """Escape a text."""
    return "".join(_SPECIAL.get(character, character) for character in text)


def _latex_head(groups: Sequence[Group]) -> list[str]:
    """Return the lines of headings: groups, where there are several, and columns."""
    rows: list[str] = []
    if len(groups) > 1:
        titles: list[str] = []
        rules: list[str] = []
        first = 2  # LaTeX counts columns from 1, and the first one names the method
        for group in groups:
            last = first + len(group.columns) - 1
            titles.append(rf" & \multicolumn{{{len(group.columns)}}}{{c}}{{{_tex(group.title)}}}")
            rules.append(rf"\cmidrule(lr){{{first}-{last}}}")
            first = last + 1
        rows += ["".join(titles) + r" \\", "".join(rules)]
    headings = ["Method"]
    for group in groups:
        for column in group.columns:
            headings.append(_tex(column.heading) + (r" $\downarrow$" if column.lower else ""))
    return [*rows, " & ".join(headings) + r" \\"]


def _latex_body(table: JoinedTable) -> list[str]:
    rows: list[str] = []
    for index, block in enumerate(table.blocks):
        if index > 0:
            rows.append(r"\midrule")
        if block.title:
            rows.append(rf"\multicolumn{{{len(table.columns) + 1}}}{{@{{}}l}}{{\textit{{{_tex(block.title)}}}}} \\")
        for line in block.lines:
            label = rf"\textit{{{_tex(line.label)}}}" if line.is_paper else _tex(line.label)
            rows.append(" & ".join([label, *_written(table.columns, line, _latex_cell, "--")]) + r" \\")
    return rows


def _written(columns: Sequence[Column], line: Line, write: Callable[[Column, Cell], str], empty: str) -> list[str]:
    """Return the cells of a line as text."""
    texts: list[str] = []
    for column, cell in zip(columns, line.cells, strict=True):
        texts.append(empty if cell is None else write(column, cell))
    return texts


def _latex_cell(column: Column, cell: Cell) -> str:
    """Write a value with the ends of its interval above and below, or its deviation, in little room."""
    value = column.write(cell.score.value)
    if cell.mark == "best":
        value = rf"\mathbf{{{value}}}"
    elif cell.mark == "near":
        value = rf"\underline{{{value}}}"
    if cell.score.ends is None:
        return f"${value}$"
    low, high = cell.score.ends
    if cell.seeds > 1:
        return rf"${value}_{{\pm {column.write_size((high - low) / 2)}}}$"
    return f"${value}^{{{column.write(high)}}}_{{{column.write(low)}}}$"


def joined_markdown(table: JoinedTable, results: Sequence[Result]) -> str:
    """Return the table as Markdown, with the conditions of its numbers."""
    columns = table.columns
    titles: list[str] = []
    for group in table.groups:
        titles += [f"{group.title}: {column.heading}" if group.title else column.heading for column in group.columns]
    arrows = [" ↓" if column.lower else "" for column in columns]
    head = ["method", *(title + arrow for title, arrow in zip(titles, arrows, strict=True))]
    has_models = len(table.blocks) > 1
    rows: list[list[str]] = []
    for block in table.blocks:
        for line in block.lines:
            row = [line.label, *_written(columns, line, _markdown_cell, "-")]
            rows.append([block.title, *row] if has_models else row)
    if has_models:
        head = ["model", *head]
    blocks = [
        f"**{table.subject}**",
        markdown_table(head, rows, left=2 if has_models else 1),
        markdown_list([f"Values are {table.spread}. {LEGEND}", *table.notes, *conditions(results)]),
    ]
    return "\n\n".join(blocks) + "\n"


def _markdown_cell(column: Column, cell: Cell) -> str:
    value = column.write(cell.score.value)
    if cell.mark == "best":
        value = f"**{value}**"
    elif cell.mark == "near":
        value = f"<u>{value}</u>"
    if cell.score.ends is None:
        return value
    low, high = cell.score.ends
    if cell.seeds > 1:
        return f"{value} ± {column.write_size((high - low) / 2)}"
    return f"{value} [{column.write(low)}, {column.write(high)}]"
