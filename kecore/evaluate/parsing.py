"""From the text of a file to its objects: JSON, JSONL, YAML and tables, told by the suffix and by what stands there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, cast

from kecore.api.errors import DataFormatError
from kecore.evaluate.chats import is_chat
from kecore.evaluate.tables import first_rows, read_table
from kecore.evaluate.written import parse_json

__all__ = ["load_json", "read_objects"]

_TABLES = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_YAML = (".yaml", ".yml")
_MARKDOWN = (".md", ".markdown")


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
        return read_table(text, name, _TABLES[kind])
    if kind in _YAML:
        return _read_yaml(text, name)
    if kind in (".json", ".jsonl", ".ndjson") or text.lstrip()[:1] in ("[", "{", ""):
        return _read_json(text, name)
    if kind in _MARKDOWN:
        text = _table_of_markdown(text, name)
    if text.lstrip().startswith("<"):
        raise DataFormatError(
            f"{name}: expected JSON, JSONL, YAML or a table, got XML or HTML; turn it into CSV or JSON"
        )
    rows = first_rows(text)
    if len(rows) > 1 and len(rows[0]) > 1 and len(rows[0]) == len(rows[1]):
        return read_table(text, name, ",")
    if "\x00" in text[:4096]:
        raise DataFormatError(
            f"{name}: the file holds no text; expected JSON, JSONL, YAML, a table or another known kind"
        )
    begin = text.lstrip().partition("\n")[0].strip()
    raise DataFormatError(
        f"{name}: expected JSON, JSONL, YAML or a table, got plain text that begins {begin!r:.60}; write one fact a "
        "line below a header line, with its parts apart: prompt,subject,target"
    )


def _table_of_markdown(text: str, name: str) -> str:
    """Return the lines of the table that stands in a text; the text itself where none does."""
    tables: list[list[str]] = []
    is_inside = False
    for line in text.splitlines():
        is_row = line.strip().startswith("|")
        if is_row and not is_inside:
            tables.append([])
        if is_row:
            tables[-1].append(line.strip())
        is_inside = is_row
    if len(tables) > 1:
        raise DataFormatError(f"{name} holds {len(tables)} tables; put each into a file of its own")
    return "\n".join(tables[0]) if tables else text


def _read_json(text: str, name: str) -> Iterator[tuple[str, Any]]:
    """Read the values of a JSON array, of one JSON object, or of the lines of a JSONL file."""
    start = text.lstrip()
    if not start:
        raise DataFormatError(f"{name} is empty; expected facts, as a JSON array or one object a line")
    first_line, _, below = start.partition("\n")
    is_one_array = start[0] == "[" and not below.strip()
    if is_one_array or not _is_json(first_line):
        # One value, which may take many lines; else the first line is bad.
        try:
            yield from _items(parse_json(text), name)
            return
        except (ValueError, RecursionError):
            if start[0] == "[":
                load_json(text, name)  # says what is wrong, and where
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{name} line {number}"
            value = load_json(line, where)
            if isinstance(value, list) and not all(isinstance(item, dict | list) for item in cast("list[Any]", value)):
                yield where, value  # one row of cells, or a triple
            else:
                yield from _items(value, where)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _items(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield the items of an array; a chat, which is an array of turns, and any other value as it is."""
    if not isinstance(value, list) or is_chat(value):
        yield where, value
        return
    for number, item in enumerate(cast("list[Any]", value), 1):
        yield f"{where} record {number}", item


def load_json(text: str, where: str) -> Any:
    """Return a value with numbers as they are written.

    Raises:
        DataFormatError: it is no JSON; names the place.
    """
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataFormatError(f"{where}: not JSON ({error}); {_json_hint(text)}") from None
    except RecursionError:
        raise DataFormatError(f"{where}: objects stand too deep in each other to be facts") from None


def _json_hint(text: str) -> str:
    """Say what is usual and not JSON, where a text has it."""
    if re.match(r"\s*[\[{]*\s*'", text):
        return "texts and names stand in double quotes"
    if re.search(r",\s*[\]}]", text):
        return "no comma stands before a closing bracket"
    if re.search(r"^\s*(?://|/\*|#)", text, re.MULTILINE):
        return "JSON has no comments"
    if text.rstrip().endswith(","):
        return "no comma stands behind the object of a line"
    return "expected a JSON array or one object a line"


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
    if len(documents) == 1 and not isinstance(documents[0], list):
        yield name, values[0]
        return
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
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise yaml.constructor.ConstructorError(
                    None, None, f"field '{twice}' stands there twice", node.start_mark
                )
            return super().construct_mapping(node, deep)

    for tag in ("int", "float", "bool", "timestamp"):
        AsWritten.add_constructor(f"tag:yaml.org,2002:{tag}", lambda _loader, node: node.value)
    return AsWritten
