"""From the text of a file to its objects: JSON, JSONL, YAML and tables, told by the suffix and by what stands there."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, cast

from kecore.api.errors import DataFormatError
from kecore.evaluate.fields import WrittenFloat

__all__ = ["load_json", "read_cell", "read_objects"]

_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_TABLES = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_YAML = (".yaml", ".yml")
_RULE = re.compile(r"\s*:?-{2,}:?\s*|")
"""A cell of the line that Markdown draws below a header."""


def read_objects(text: str, name: str, kind: str) -> Iterator[tuple[str, Any]]:
    """Read what a text holds, each object with its place, one by one.

    Args:
        text: JSON, JSONL, YAML or a table.
        name: what messages call it.
        kind: the file's suffix, such as ``.csv``. What stands in the text decides where the suffix does not.

    Raises:
        DataFormatError: it is empty, broken, or none of these.
    """
    if "\r" in text and "\n" not in text:
        text = text.replace("\r", "\n")  # lines as old Macintosh programs end them
    if kind in _TABLES:
        return _read_table(text, name, _TABLES[kind])
    if kind in _YAML:
        return _read_yaml(text, name)
    if kind in (".json", ".jsonl", ".ndjson") or text.lstrip()[:1] in ("[", "{", ""):
        return _read_json(text, name)
    header = text.split("\n", 1)[0]
    if any(delimiter in header for delimiter in _DELIMITERS):
        return _read_table(text, name, ",")
    raise DataFormatError(
        f"{name}: expected JSON, JSONL, YAML or a table, got plain text that begins {header.strip()!r:.60}; write one "
        "fact a line below a header line, such as: prompt,subject,target"
    )


def _read_json(text: str, name: str) -> Iterator[tuple[str, Any]]:
    """Read the values of a JSON array, of one JSON object, or of the lines of a JSONL file."""
    start = text.lstrip()
    if not start:
        raise DataFormatError(f"{name} is empty; expected JSON or JSONL records")
    if start[0] == "[":
        for number, value in enumerate(load_json(text, name), 1):
            yield f"{name} record {number}", value
        return
    try:
        json.loads(start.partition("\n")[0])
    except (ValueError, RecursionError):
        # The first line is no object by itself: either one object takes many lines, or the line is bad.
        with suppress(ValueError, RecursionError):
            yield name, _parse_json(text)
            return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{name} line {number}", load_json(line, f"{name} line {number}")


def load_json(text: str, where: str) -> Any:
    """Return a value with numbers as they are written.

    Raises:
        DataFormatError: it is no JSON; names the place.
    """
    try:
        return _parse_json(text)
    except ValueError as error:
        raise DataFormatError(f"{where}: not JSON ({error}); expected a JSON array or one object a line") from None
    except RecursionError:
        raise DataFormatError(f"{where}: objects stand too deep in each other to be facts") from None


def _parse_json(text: str) -> Any:
    """Read JSON with numbers as they are written.

    Raises:
        ValueError: it is no JSON, an object has a field twice, or a text is none that can be written.
    """
    if "\\ud" in text.casefold():
        json.dumps(json.loads(text), ensure_ascii=False).encode()  # a half of a pair of surrogates is no character
    return json.loads(text, parse_float=WrittenFloat, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field '{next(name for name in names if names.count(name) > 1)}' stands there twice")
    return values


def _read_yaml(text: str, name: str) -> Iterator[tuple[str, Any]]:
    """Read the items of YAML lists, or YAML documents that are one object each."""
    import yaml  # pyright: ignore[reportMissingModuleSource] - its stubs are no dependency

    try:
        documents = list(yaml.load_all(text, Loader=_yaml_loader()))
        json.dumps(documents, default=str)  # what JSON cannot hold is no record
    except (yaml.YAMLError, ValueError) as error:
        raise DataFormatError(f"{name}: not YAML of records ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise DataFormatError(f"{name}: objects stand too deep in each other to be facts") from None
    values: list[Any] = []
    for document in documents:
        if isinstance(document, list):
            values += map(_with_text_names, cast("list[Any]", document))
        elif document is not None:
            values.append(_with_text_names(document))
    if not values:
        raise DataFormatError(f"{name} is empty; expected YAML records")
    for number, value in enumerate(values, 1):
        yield f"{name} record {number}", value


def _with_text_names(value: Any) -> Any:
    """Return an object with its names as texts, where YAML has numbers or nothing."""
    if isinstance(value, dict):
        return {str(name): field for name, field in cast("dict[Any, Any]", value).items()}
    return value


def _yaml_loader() -> Any:
    """Return a safe loader that leaves numbers, dates and booleans as they are written, for targets such as ``no``."""
    import yaml  # pyright: ignore[reportMissingModuleSource] - as above

    class AsWritten(yaml.SafeLoader):
        pass

    for tag in ("int", "float", "bool", "timestamp"):
        AsWritten.add_constructor(f"tag:yaml.org,2002:{tag}", lambda _loader, node: node.value)
    return AsWritten


def _read_table(text: str, name: str, usual: str) -> Iterator[tuple[str, Any]]:
    """Read the rows of a table with a header; empty cells are missing fields, JSON lists and objects are read.

    Args:
        text: the table.
        name: what messages call it.
        usual: the delimiter that the suffix stands for; another one that divides the header into more columns is taken.
    """
    text = text.lstrip("\r\n")
    first, _, below = text.partition("\n")
    if first.strip().casefold().startswith("sep=") and len(first.strip()) == len("sep=") + 1:
        usual, text = first.strip()[-1], below  # as Excel writes it
    delimiter = _find_delimiter(text, usual)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [column.strip() for column in next(rows, [])]
        if not any(header):
            raise DataFormatError(f"{name} is empty; expected a header line and records")
        twice = next((column for column in header if column and header.count(column) > 1), None)
        if twice is not None:
            raise DataFormatError(f"{name}: the header names the column '{twice}' twice")
        for number, row in enumerate(rows, 1):
            if any(row) and not all(_RULE.fullmatch(cell) for cell in row):
                where = f"{name} record {number}"
                yield where, _cells_by_column(header, row, where, delimiter)
    except csv.Error as error:
        raise DataFormatError(f"{name} line {rows.line_num}: not a table ({error})") from None


def _find_delimiter(text: str, usual: str) -> str:
    """Return the delimiter that divides header and first row alike into most columns; the usual one on a tie."""
    columns: dict[str, int] = {usual: 1}
    for delimiter in (usual, *_DELIMITERS):
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        with suppress(csv.Error):
            header = len(next(rows, []))
            first = len(next((row for row in rows if row), [])) or header
            # A text with commas in the header is no reason to take the comma, if the rows have none.
            columns[delimiter] = header if header == first else 1
    return max(columns, key=lambda delimiter: columns[delimiter])


def _cells_by_column(header: list[str], row: list[str], where: str, delimiter: str) -> dict[str, Any]:
    if len(row) != len(header):
        raise DataFormatError(
            f"{where}: expected {len(header)} cells as in the header, got {len(row)}; a cell that holds a "
            f"{_DELIMITERS.get(delimiter, delimiter)} stands in double quotes"
        )
    values: dict[str, Any] = {}
    for column, cell in zip(header, row, strict=True):
        if not cell.strip():
            continue
        if not column:
            raise DataFormatError(f"{where}: {cell!r} stands in a column without a name; name it in the header")
        values[column] = read_cell(cell)
    return values


def read_cell(text: str) -> Any:
    """Return what a cell of a table holds: its text, or the list or object that stands there as JSON.

    A list of numbers, as ``[1, 2]``, is a text.
    """
    if text[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError):
            value = _parse_json(text)
            if not isinstance(value, list) or any(isinstance(item, str | dict | list) for item in cast(Any, value)):
                return value
    return text
