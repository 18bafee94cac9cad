"""From the bytes of a file to its text, or to its rows where it is no text: spreadsheets, Parquet and Arrow tables."""

from __future__ import annotations

import datetime
import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from kecore.api.errors import ConfigError, DataFormatError, MissingDependencyError
from kecore.evaluate.parsing import read_cell

__all__ = ["Decoded", "decode", "kind_of"]

_PACKED = (".gz", ".zst")
_ZSTD = b"\x28\xb5\x2f\xfd"
_MARKS = (  # of four bytes before of two, which begin alike
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
)
# What other files begin with, and what they are: none of them holds facts.
_FOREIGN = (
    (b"GGUF", "a GGUF model"),
    (b"\x80\x02", "a Python pickle, such as a torch checkpoint"),
    (b"\x80\x03", "a Python pickle, such as a torch checkpoint"),
    (b"\x80\x04", "a Python pickle, such as a torch checkpoint"),
    (b"\x80\x05", "a Python pickle, such as a torch checkpoint"),
    (b"\xff\xd8\xff", "an image"),
    (b"BZh", "a file packed by bzip2; unpack it"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (b"version https://git-lfs", "a pointer of Git LFS; fetch the file with git lfs pull"),
    (b"<!DOCTYPE", "a web page"),
    (b"<html", "a web page"),
    (b"%PDF", "a PDF document"),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word file; save it as .xlsx or CSV"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\x89PNG", "an image"),
)
_FORMATS = "JSON, JSONL, YAML, CSV, TSV, .xlsx, Parquet or Arrow"


class Decoded(NamedTuple):
    """What a file holds.

    Args:
        text: its text; None where it is a table of another kind.
        rows: the rows of that table, by column.
        content: its bytes, unpacked.
    """

    text: str | None
    rows: Sequence[dict[str, Any]]
    content: bytes


def kind_of(path: Path) -> str:
    """Return the suffix that tells how to read a file, in small letters and without ``.gz`` and ``.zst``."""
    suffixes = [suffix.casefold() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in _PACKED), "")


def decode(stored: bytes, path: Path, sheet: str | None = None) -> Decoded:
    """Read the bytes of a file of facts.

    Args:
        stored: the bytes, which may be packed by gzip or Zstandard.
        path: the file, for its suffix and for messages.
        sheet: the sheet of a spreadsheet that has several.

    Raises:
        DataFormatError: the bytes are those of something else, broken, or text in an unknown encoding; a spreadsheet
            has several sheets.
        ConfigError: there is no such sheet, or the file has none.
        MissingDependencyError: a library that reads it is not installed.
    """
    content = _unpack(stored, path)
    _refuse_foreign(content, path)
    if content.startswith(b"PK\x03\x04"):
        _refuse_other_archives(content, path)
        return Decoded(None, _read_spreadsheet(content, path, sheet), content)
    if sheet is not None:
        raise ConfigError(f"split '{sheet}' was asked of the single file {path}; give its folder, or leave it out")
    if content.startswith(b"PAR1"):
        return Decoded(None, _read_parquet(content, path), content)
    if content.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return Decoded(None, _read_arrow(content, path), content)
    return Decoded(_decode_text(content, path), (), content)


def _unpack(stored: bytes, path: Path) -> bytes:
    if stored.startswith(b"\x1f\x8b"):
        try:
            return gzip.decompress(stored)
        except (OSError, EOFError, zlib.error) as error:
            raise DataFormatError(f"{path}: the gzip data is broken ({error}); copy the file again") from None
    if stored.startswith(_ZSTD):
        arrow = _import_arrow(path)
        try:
            return bytes(arrow.CompressedInputStream(arrow.BufferReader(stored), "zstd").read())
        except OSError as error:
            raise DataFormatError(f"{path}: the Zstandard data is broken ({error}); copy the file again") from None
    return stored


def _refuse_foreign(content: bytes, path: Path) -> None:
    """Refuse files that hold no facts, which people give by mistake: a model, an image, a document."""
    what = next((what for beginning, what in _FOREIGN if content.startswith(beginning)), None)
    # A .safetensors file begins with the length of its header, which is JSON.
    if what is None and content[8:9] == b"{" and b"\x00" in content[:8]:
        what = "a .safetensors file, such as a model or an edit"
    if what is not None:
        raise DataFormatError(f"{path}: expected facts as {_FORMATS}, got {what}")


def _refuse_other_archives(content: bytes, path: Path) -> None:
    """Refuse zip archives that are no spreadsheet, as torch and Word write them."""
    try:
        names = zipfile.ZipFile(io.BytesIO(content)).namelist()
    except zipfile.BadZipFile as error:
        raise DataFormatError(f"{path}: a broken zip archive ({error}); copy it again") from None
    if "xl/workbook.xml" in names:
        return
    what = "a zip archive without a spreadsheet"
    if any(name.endswith("data.pkl") for name in names):
        what = "a torch checkpoint"
    elif any(name.startswith("word/") for name in names):
        what = "a Word document"
    raise DataFormatError(f"{path}: expected facts as {_FORMATS}, got {what}")


def _decode_text(content: bytes, path: Path) -> str:
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), None)
    if encoding is None:
        encoding = _unmarked_encoding(content)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataFormatError(f"{path}: not UTF-8 text ({error}); {_encoding_hint(content, error, path)}") from None


def _unmarked_encoding(content: bytes) -> str:
    """Return ``utf-8``, or the kind of UTF-16 whose zero bytes are seen between characters of a Western text."""
    head = content[:4096]
    pairs = len(head) // 2
    if head.count(0) > 0.8 * len(head):
        return "utf-8"  # zeros and little else are no text
    if head[1::2].count(0) > 0.7 * pairs > 0:
        return "utf-16-le"
    if head[0::2].count(0) > 0.7 * pairs > 0:
        return "utf-16-be"
    return "utf-8"


def _encoding_hint(content: bytes, error: UnicodeDecodeError, path: Path) -> str:
    """Say what the text would be in the encoding that spreadsheets write beside UTF-8."""
    if b"\x00" in content:
        return f"the file holds no text; expected facts as {_FORMATS}"
    start = max(content.rfind(b"\n", 0, error.start) + 1, error.start - 20)
    sample = content[start : error.start + 12].decode("cp1252", errors="replace").splitlines()[0]
    return (
        f"read as Windows-1252 it is {sample!r}; if that is right, save it as 'CSV UTF-8', or convert it to UTF-8: "
        f"iconv -f WINDOWS-1252 -t UTF-8 {path.name} > utf8-{path.name}"
    )


def _read_spreadsheet(content: bytes, path: Path, sheet: str | None) -> list[dict[str, Any]]:
    try:
        import openpyxl  # pyright: ignore[reportMissingImports, reportMissingModuleSource] - an extra
    except ImportError as error:
        raise MissingDependencyError(
            f"{path} is a spreadsheet, which openpyxl reads: pip install 'kecore[data]'; or save it as CSV"
        ) from error
    filled: dict[str, list[tuple[Any, ...]]] = {}
    try:
        # Not read_only, in which openpyxl stumbles over sheets that are charts.
        book = cast(Any, openpyxl).load_workbook(io.BytesIO(content), data_only=True)
        for worksheet in book.worksheets:
            rows = [row for row in worksheet.iter_rows(values_only=True) if any(cell is not None for cell in row)]
            if rows:
                filled[worksheet.title] = rows
    except Exception as error:  # noqa: BLE001 - a broken file makes openpyxl, zipfile and the XML parser raise anything
        raise DataFormatError(
            f"{path}: a broken spreadsheet ({type(error).__name__}: {error}); open it and save it again"
        ) from None
    if sheet is not None and sheet not in filled:
        raise ConfigError(f"{path} has no sheet '{sheet}' with rows; its sheets: {', '.join(filled) or 'none'}")
    if sheet is None and len(filled) > 1:
        raise DataFormatError(f"{path} has the sheets {', '.join(filled)}; choose one with split=")
    if not filled:
        raise DataFormatError(f"{path} is empty; expected a header row and records")
    return list(_rows_of_sheet(filled[sheet or next(iter(filled))], path))


def _rows_of_sheet(rows: Sequence[Sequence[Any]], path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows below the header, with texts as the sheet shows them."""
    header = ["" if cell is None else str(cell).strip() for cell in rows[0]]
    twice = next((column for column in header if column and header.count(column) > 1), None)
    if twice is not None:
        raise DataFormatError(f"{path}: the header names the column '{twice}' twice")
    for number, row in enumerate(rows[1:], 2):
        values: dict[str, Any] = {}
        for column, cell in zip(header, row, strict=False):
            if cell is None:
                continue
            if not column:
                raise DataFormatError(f"{path} row {number}: {cell!r} stands in a column without a name; name it")
            values[column] = _cell_text(cell)
        yield values


def _cell_text(cell: Any) -> Any:
    if isinstance(cell, bool):
        return str(cell).upper()  # as the sheet shows it
    if isinstance(cell, datetime.datetime) and cell.time() == datetime.time():
        return cell.date().isoformat()
    if isinstance(cell, datetime.datetime | datetime.date | datetime.time):
        return cell.isoformat(sep=" ") if isinstance(cell, datetime.datetime) else cell.isoformat()
    return read_cell(cell) if isinstance(cell, str) else cell


def _import_arrow(path: Path) -> Any:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports, reportMissingTypeStubs] - an extra
    except ImportError as error:
        raise MissingDependencyError(f"{path} is read by pyarrow: pip install 'kecore[data]'") from error
    return cast(Any, pyarrow)


def _read_parquet(content: bytes, path: Path) -> list[dict[str, Any]]:
    arrow = _import_arrow(path)
    import pyarrow.parquet  # pyright: ignore[reportMissingImports, reportMissingTypeStubs] - an extra

    try:
        return cast(Any, pyarrow.parquet).read_table(arrow.BufferReader(content)).to_pylist()
    except Exception as error:  # noqa: BLE001 - what pyarrow cannot turn into Python raises whatever the type raises
        raise DataFormatError(f"{path}: a broken Parquet file ({error}), or a column that cannot be read") from None


def _read_arrow(content: bytes, path: Path) -> list[dict[str, Any]]:
    arrow = _import_arrow(path)
    opened = arrow.ipc.open_file if content.startswith(b"ARROW1") else arrow.ipc.open_stream
    try:
        return opened(arrow.BufferReader(content)).read_all().to_pylist()
    except Exception as error:  # noqa: BLE001 - what pyarrow cannot turn into Python raises whatever the type raises
        raise DataFormatError(f"{path}: a broken Arrow file ({error}), or a column that cannot be read") from None
