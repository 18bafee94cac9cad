"""From the text of a table (CSV, TSV, Markdown) to its rows, and what tables of every kind have in common."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from kecore.api.errors import DataFormatError
from kecore.evaluate.written import read_cell

__all__ = ["check_header", "find_header", "first_rows", "is_row_number", "read_table"]

_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_HEAD = 12
"""Lines among which the header is looked for: titles and remarks may stand above it."""
_RULE = re.compile(r"\s*:?-{2,}:?\s*|")
"""A cell of the line that Markdown draws below a header."""


def find_header(rows: Sequence[Sequence[str]]) -> int:
    """Return which row is the header: the first with several filled cells, since a title above a table fills one."""
    counts = [sum(1 for cell in row if cell.strip()) for row in rows]
    for wanted in (2, 1):
        for index, count in enumerate(counts):
            if count >= wanted:
                return index
    return 0


def check_header(header: Sequence[str], name: str) -> None:
    """Refuse a header that names a column twice.

    Raises:
        DataFormatError: says which.
    """
    twice = next((column for column in header if column and list(header).count(column) > 1), None)
    if twice is not None:
        raise DataFormatError(f"{name}: the header names the column '{twice}' twice; rename one")


def is_row_number(cell: str) -> bool:
    """Return whether a cell holds what pandas and R write in front of a row, in a column without a name."""
    return cell.strip().isdecimal()


def _find_delimiter(text: str, usual: str) -> str:
    """Return the delimiter that divides the header and the row below it alike into most columns.

    Args:
        text: the table.
        usual: taken on a tie, and where nothing divides the header.
    """
    columns: dict[str, int] = {usual: 1}
    for delimiter in (usual, *_DELIMITERS):
        with suppress(csv.Error):
            rows = first_rows(text, delimiter)
            at = find_header(rows)
            header = len(rows[at]) if rows else 0
            first = len(rows[at + 1]) if at + 1 < len(rows) else header
            # A text with commas in the header is no reason to take the comma, if the rows have none.
            columns[delimiter] = header if header == first else 1
    return max(columns, key=lambda delimiter: columns[delimiter])


def first_rows(text: str, delimiter: str = "") -> list[list[str]]:
    """Return the first rows of a table that hold something.

    Args:
        text: the table.
        delimiter: between cells; by default the one that divides the text best.
    """
    delimiter = delimiter or _find_delimiter(text, ",")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    return list(islice((row for row in rows if any(cell.strip() for cell in row)), _HEAD))


def read_table(text: str, name: str, usual: str) -> Iterator[tuple[str, Any]]:
    """Read the rows of a table with a header, one by one.

    Empty cells are missing fields. Lists and objects that stand in a cell as JSON are read.

    Args:
        text: the table.
        name: what messages call it.
        usual: the delimiter that the file's suffix stands for; another one that divides the header into more columns is
            taken.

    Raises:
        DataFormatError: it is empty, a row has other cells than the header, or a column has no name.
    """
    text = text.lstrip("\r\n")
    first, _, below = text.partition("\n")
    if first.strip().casefold().startswith("sep=") and len(first.strip()) == len("sep=") + 1:
        usual, text = first.strip()[-1], below  # as Excel writes it
    delimiter = _find_delimiter(text, usual)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = _read_header(rows, find_header(first_rows(text, delimiter)), name)
        number = 0
        for row in rows:
            if any(cell.strip() for cell in row) and not all(_RULE.fullmatch(cell) for cell in row):
                number += 1
                where = f"{name} record {number}"
                yield where, _cells_by_column(header, row, where, delimiter)
        if not number:
            raise DataFormatError(f"{name} has a header ({', '.join(filter(None, header))}) and no rows below it")
    except csv.Error as error:
        raise DataFormatError(
            f"{name} line {rows.line_num}: not a table ({error}); a cell that begins with a double quote ends at the "
            "next one, and inside of it a double quote is written twice"
        ) from None


def _read_header(rows: Iterator[list[str]], titles: int, name: str) -> list[str]:
    """Read the header, behind as many rows that hold something as there are titles."""
    filled = (row for row in rows if any(cell.strip() for cell in row))
    header = [column.strip() for column in next(islice(filled, titles, None), [])]
    if not header:
        raise DataFormatError(f"{name} is empty; expected a header line and records")
    check_header(header, name)
    return header


def _cells_by_column(header: list[str], row: list[str], where: str, delimiter: str) -> dict[str, Any]:
    if len(row) != len(header):
        raise DataFormatError(
            f"{where}: expected {len(header)} cells as in the header, got {len(row)}; a cell that holds a "
            f"{_DELIMITERS.get(delimiter, delimiter)} or a line break stands in double quotes"
        )
    values: dict[str, Any] = {}
    for index, (column, cell) in enumerate(zip(header, row, strict=True)):
        if not cell.strip():
            continue
        if column:
            values[column] = read_cell(cell)
        elif index > 0 or not is_row_number(cell):
            raise DataFormatError(f"{where}: {cell!r} stands in a column without a name; name it in the header")
    return values
