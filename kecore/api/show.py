"""Shows values in a line, and in a notebook as a small table; a few rows of many."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

__all__ = ["html_table", "shorten"]

_ROWS = 10


def shorten(text: str, length: int = 48) -> str:
    """Return a text on one line, cut to a length."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."


def html_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]], *, most: int = _ROWS) -> str:
    """Return a table of texts for a notebook: the first rows, and how many there are besides.

    Args:
        title: stands above it.
        headers: one a column.
        rows: their cells.
        most: rows that are shown.
    """
    head = "".join(f"<th style='text-align:left'>{escape(header)}</th>" for header in headers)
    lines: list[str] = []
    for row in rows[:most]:
        cells = "".join(f"<td style='text-align:left'>{escape(str(cell))}</td>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    more = f"<p>... and {len(rows) - most} more</p>" if len(rows) > most else ""
    return f"<p>{escape(title)}</p><table><tr>{head}</tr>{''.join(lines)}</table>{more}"
