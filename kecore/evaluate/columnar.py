"""From a Parquet, Arrow or Feather file to its rows, with values that JSON has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from kecore.api.errors import DataFormatError, MissingDependencyError
from kecore.evaluate.written import WrittenFloat

__all__ = ["import_arrow", "read_arrow", "read_parquet", "rows_of", "without_bytes"]

_INDEX = "__index_level_"
"""What the names of columns begin with in which pandas keeps the numbers of rows."""


def import_arrow(path: Path) -> Any:
    """Return the library.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import pyarrow  # pyright: ignore[reportMissingImports, reportMissingTypeStubs] - an extra
    except ImportError as error:
        raise MissingDependencyError(f"{path} is read by pyarrow: pip install 'kecore[data]'") from error
    return cast(Any, pyarrow)


def read_parquet(content: bytes, path: Path) -> list[dict[str, Any]]:
    """Read the rows of a Parquet file.

    Raises:
        DataFormatError: it is broken, or a column cannot be read.
        MissingDependencyError: pyarrow is not installed.
    """
    arrow = import_arrow(path)
    import pyarrow.parquet  # pyright: ignore[reportMissingImports, reportMissingTypeStubs] - an extra

    try:
        return rows_of(cast(Any, pyarrow.parquet).read_table(arrow.BufferReader(content)))
    except Exception as error:  # noqa: BLE001 - what pyarrow cannot turn into Python raises whatever the type raises
        raise DataFormatError(f"{path}: a broken Parquet file ({error}), or a column that cannot be read") from None


def read_arrow(content: bytes, path: Path) -> list[dict[str, Any]]:
    """Read the rows of an Arrow file or stream, such as Feather's and those of the datasets library.

    Raises:
        DataFormatError: it is broken, or a column cannot be read.
        MissingDependencyError: pyarrow is not installed.
    """
    arrow = import_arrow(path)
    opened = arrow.ipc.open_file if content.startswith(b"ARROW1") else arrow.ipc.open_stream
    try:
        return rows_of(opened(arrow.BufferReader(content)).read_all())
    except Exception as error:  # noqa: BLE001 - what pyarrow cannot turn into Python raises whatever the type raises
        raise DataFormatError(f"{path}: a broken Arrow file ({error}), or a column that cannot be read") from None


def rows_of(table: Any) -> list[dict[str, Any]]:
    """Return the rows of an Arrow table or a batch of one.

    Short floats are as they were written, bytes are texts, and pandas' numbers of rows are left out.
    """
    short_floats = [field.name for field in table.schema if str(field.type) in ("float", "halffloat")]
    written = {name: table.column(name).cast("string").to_pylist() for name in short_floats}
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(table.to_pylist()):
        for name in short_floats:
            if row[name] is not None:
                row[name] = WrittenFloat(written[name][number])
        rows.append({name: without_bytes(value) for name, value in row.items() if not name.startswith(_INDEX)})
    return rows


def without_bytes(value: Any) -> Any:
    """Return a value with texts for bytes: what they say in UTF-8, or how many they are, as those of pictures."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return f"({len(value)} bytes)"
    if isinstance(value, Mapping):
        return {name: without_bytes(item) for name, item in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, list):
        return [without_bytes(item) for item in cast("list[Any]", value)]
    return value
