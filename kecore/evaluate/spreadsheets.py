"""From an Excel file to its rows, with texts as a person sees them in the sheet."""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

from kecore.api.errors import ConfigError, DataFormatError, KecoreWarning, MissingDependencyError
from kecore.evaluate.cell_formats import shown
from kecore.evaluate.tables import check_header, find_header, is_row_number
from kecore.evaluate.written import as_text, read_cell

__all__ = ["read_spreadsheet"]


def read_spreadsheet(content: bytes, path: Path, sheet: str | None) -> list[dict[str, Any]]:
    """Read the rows of a sheet below its header.

    Numbers and dates are texts as the sheet shows them (:mod:`kecore.evaluate.cell_formats`). A cell that reaches over
    several rows counts in each of them. Hidden sheets are not read unless they are named.

    Args:
        content: the file, in Office Open XML.
        path: its path, for messages.
        sheet: name of the sheet; needed where several hold something.

    Raises:
        DataFormatError: the file is broken, holds several sheets or none with rows, or a cell shows an error or has a
            formula without its value.
        ConfigError: there is no such sheet.
        MissingDependencyError: openpyxl is not installed.
    """
    try:
        import openpyxl  # pyright: ignore[reportMissingImports, reportMissingModuleSource] - an extra
    except ImportError as error:
        raise MissingDependencyError(
            f"{path} is a spreadsheet, which openpyxl reads: pip install 'kecore[data]'; or save it as CSV"
        ) from error
    library = cast(Any, openpyxl)
    try:
        # Not read_only, in which openpyxl stumbles over sheets that are charts, and knows no merged cells.
        book = library.load_workbook(io.BytesIO(content), data_only=True)
        formulas = library.load_workbook(io.BytesIO(content)) if _has_formulas(content) else None
    except Exception as error:  # noqa: BLE001 - a broken file makes openpyxl, zipfile and the XML parser raise anything
        raise DataFormatError(
            f"{path}: a broken spreadsheet ({type(error).__name__}: {error}); open it and save it again"
        ) from None
    chosen = _choose_sheet(book, path, sheet)
    return _SheetReader(chosen, None if formulas is None else formulas[chosen.title], path).read()


def _has_formulas(content: bytes) -> bool:
    """Return whether any cell holds a formula; reading them takes as long as reading the values."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        sheets = [name for name in archive.namelist() if name.startswith("xl/worksheets/")]
        return any(re.search(rb"<f[ />]", archive.read(name)) is not None for name in sheets)


def _choose_sheet(book: Any, path: Path, name: str | None) -> Any:
    filled = {sheet.title: sheet for sheet in book.worksheets if _is_filled(sheet)}
    if name is not None:
        if name not in filled:
            raise ConfigError(f"{path} has no sheet '{name}' with rows; its sheets: {', '.join(filled) or 'none'}")
        return filled[name]
    visible = {title: sheet for title, sheet in filled.items() if sheet.sheet_state == "visible"} or filled
    if len(visible) > 1:
        raise DataFormatError(
            f"{path} has the sheets {', '.join(visible)}; choose one by --split SHEET (in Python split=)"
        )
    if not visible:
        raise DataFormatError(f"{path} is empty; expected a header row and records")
    return next(iter(visible.values()))


def _is_filled(sheet: Any) -> bool:
    return any(cell is not None for cell in chain.from_iterable(sheet.iter_rows(values_only=True)))


class _SheetReader:
    """Reads one sheet.

    Args:
        sheet: openpyxl's, with the values of formulas.
        formulas: the same sheet with the formulas themselves; None where it has none.
        path: the file, for messages.
    """

    def __init__(self, sheet: Any, formulas: Any, path: Path) -> None:
        self.sheet = sheet
        self.formulas = formulas
        self.path = path
        self.unknown_formats: list[str] = []

    def read(self) -> list[dict[str, Any]]:
        """Return the rows below the header, by column.

        Raises:
            DataFormatError: a cell cannot be read.
        """
        merged = self._merged_cells()
        rows: list[list[Any]] = []
        for row in self.sheet.iter_rows():
            if any(cell.value is not None for cell in row):
                rows.append([merged.get(cell.coordinate, cell) for cell in row])
        texts = [["" if cell.value is None else str(cell.value) for cell in row] for row in rows[:20]]
        at = find_header(texts)
        header = self._header(texts[at], rows[at], rows[at + 1 :])
        if not rows[at + 1 :]:
            raise DataFormatError(f"{self.path} has a header ({', '.join(filter(None, header))}) and no rows below it")
        records = [self._read_row(header, row) for row in rows[at + 1 :]]
        if self.unknown_formats:
            warnings.warn(
                f"{self.path}: {len(self.unknown_formats)} numbers are in formats that kecore does not know; taken as "
                f"they are stored, such as {self.unknown_formats[0]}. Write them as text to be sure",
                KecoreWarning,
                stacklevel=2,
            )
        return records

    def _merged_cells(self) -> Mapping[str, Any]:
        """Return the filled cell for each cell of one that reaches over several rows of a column."""
        filled: dict[str, Any] = {}
        for area in self.sheet.merged_cells.ranges:
            if area.min_col != area.max_col:
                continue  # a title over several columns
            first = self.sheet.cell(area.min_row, area.min_col)
            for row in range(area.min_row + 1, area.max_row + 1):
                filled[self.sheet.cell(row, area.min_col).coordinate] = first
        return filled

    def _header(self, texts: Sequence[str], cells: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
        """Return the names of the columns; empty for one that only numbers the rows."""
        header = [text.strip() for text in texts]
        check_header(header, str(self.path))
        for index, name in enumerate(header):
            column = [as_text(row[index].value) or "" for row in rows if row[index].value is not None]
            if not name and column and (index > 0 or not all(map(is_row_number, column))):
                header[index] = f"column {cells[index].column_letter}"  # a remark beside the table
        return header

    def _read_row(self, header: Sequence[str], row: Sequence[Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, cell in zip(header, row, strict=True):
            if name and (text := self._cell_text(cell)) is not None:
                values[name] = text
        return values

    def _cell_text(self, cell: Any) -> Any:
        """Return what a cell shows; None where it is empty."""
        if cell.value is None:
            formula = None if self.formulas is None else self.formulas[cell.coordinate].value
            if formula is not None:
                raise DataFormatError(
                    f"{self.path}: cell {cell.coordinate} holds the formula {formula} without its value; open the file "
                    "in a spreadsheet program and save it, which stores the values"
                )
            return None
        if cell.data_type == "e":
            raise DataFormatError(
                f"{self.path}: cell {cell.coordinate} shows the error {cell.value}; mend its formula, or empty the cell"
            )
        text = shown(cell.value, cell.number_format)
        if text is None:
            self.unknown_formats.append(f"{cell.value} in {cell.coordinate}, of the format '{cell.number_format}'")
            return as_text(cell.value)
        return read_cell(text) if isinstance(cell.value, str) else text
