"""Large files of facts, such as UltraEditBench's two million: read record by record, and no further than asked for."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

from kecore.api.errors import DataFormatError, MissingDependencyError
from kecore.evaluate.columnar import rows_of
from kecore.evaluate.parsing import load_json

__all__ = ["LARGE", "Stream", "open_stream"]

LARGE = 32 * 2**20
"""Bytes, as stored, from which on a file is not read as a whole."""
_HEAD = 4096  # bytes that tell what a file is
_CHUNK = 2**20  # characters or bytes read at a time
_LONGEST = 64 * 2**20  # characters that one record may take
_ROWS = 1024  # of a Parquet file, turned into objects at a time
_GZIP = b"\x1f\x8b"
_BETWEEN = re.compile(r"[ \t\r\n]*")


class Stream(NamedTuple):
    """A large file.

    Args:
        read: begins to read its objects, each with its place.
        digests: hex SHA-256 of the bytes as stored, and of the text where that was compressed.
    """

    read: Callable[[], Iterator[tuple[str, Any]]]
    digests: tuple[str, ...]


def open_stream(path: Path, name: str) -> Stream | None:
    """Return a large JSON, JSONL or Parquet file, plain or gzipped, as a stream; None for any other file.

    Its bytes are hashed in pieces, so that a result still names the whole file.

    Args:
        path: the file; one that cannot be opened is no stream, and says so where it is read.
        name: what messages call it.

    Raises:
        DataFormatError: a gzipped file is broken.
        MissingDependencyError: it is a Parquet file, and pyarrow is not installed.
    """
    try:
        if path.stat().st_size < LARGE:
            return None
        with path.open("rb") as file:
            stored_head = file.read(_HEAD)
    except OSError:
        return None
    if stored_head.startswith(b"PAR1"):
        return Stream(partial(_read_parquet, path, name), (_digest(path, packed=False),))
    packed = stored_head.startswith(_GZIP)
    read = _choose_reader(path, packed)
    if read is None:
        return None
    digests = [_digest(path, packed=False)]
    if packed:
        digests.append(_digest(path, packed=True))
    return Stream(partial(_read_text, path, name, packed, read), tuple(digests))


TextReader = Callable[[TextIO, str], Iterator[tuple[str, Any]]]


def _choose_reader(path: Path, packed: bool) -> TextReader | None:
    """Return what reads a text: an array or lines of JSON; None where it is neither, or in another encoding."""
    try:
        with _open_text(path, packed) as file:
            head = file.read(_HEAD).lstrip()
            if "\x00" in head:
                return None
            if head.startswith("["):
                return _read_array
            first_line = head.partition("\n")[0] if "\n" in head else head + file.readline(_CHUNK)
            json.loads(first_line)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError):
        return None  # said where the file is read as a whole
    return _read_lines if head.startswith("{") else None


def _open_text(path: Path, packed: bool) -> TextIO:
    # Lines end at line feeds alone, as where a text is read as a whole.
    if packed:
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8-sig", newline="\n"))
    return path.open(encoding="utf-8-sig", newline="\n")


def _digest(path: Path, packed: bool) -> str:
    digest = sha256()
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except (OSError, EOFError, zlib.error) as error:
        raise _broken(path, packed, error) from None
    return digest.hexdigest()


def _broken(path: Path, packed: bool, error: Exception) -> DataFormatError:
    what = "the gzip data is broken" if packed else "cannot be read to its end"
    return DataFormatError(f"{path}: {what} ({error}); copy the file again")


def _read_text(path: Path, name: str, packed: bool, read: TextReader) -> Iterator[tuple[str, Any]]:
    try:
        with _open_text(path, packed) as file:
            yield from read(file, name)
    except UnicodeDecodeError as error:
        raise DataFormatError(f"{path}: not UTF-8 text ({error}); convert it to UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise _broken(path, packed, error) from None


def _read_lines(file: TextIO, name: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            where = f"{name} line {number}"
            yield where, load_json(line, where)


def _read_array(file: TextIO, name: str) -> Iterator[tuple[str, Any]]:
    """Read the values of an array one by one; only the text of the value at hand is kept."""
    window = _Window(file)
    window.skip("[")
    number = 0
    while not window.skip("]"):
        if number and not window.skip(","):
            raise DataFormatError(f"{name} record {number}: not JSON (expected ',' or ']' behind it)")
        number += 1
        where = f"{name} record {number}"
        yield where, load_json(window.take_value(where), where)
    if not window.is_empty():
        raise DataFormatError(f"{name}: there is more behind the array; expected one JSON array, or one object a line")


class _Window:
    """The part of a text that was read and not yet used.

    Args:
        file: the text.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._start = 0
        self._decoder = json.JSONDecoder()

    def skip(self, mark: str) -> bool:
        """Go past white space, and past a mark where one follows; return whether it does."""
        while True:
            match = _BETWEEN.match(self._text, self._start)
            self._start = match.end() if match else self._start
            if self._start < len(self._text) or not self._read(_CHUNK):
                break
        if not self._text.startswith(mark, self._start):
            return False
        self._start += 1
        return True

    def is_empty(self) -> bool:
        """Go past white space, and return whether nothing else is left."""
        self.skip("\x00")  # stands in no JSON
        return self._start >= len(self._text)

    def take_value(self, where: str) -> str:
        """Return the text of the next value and go past it.

        Raises:
            DataFormatError: it is no JSON, or longer than any record.
        """
        self.skip(" ")
        size = _CHUNK
        while True:
            try:
                _, end = self._decoder.raw_decode(self._text, self._start)
            except ValueError as error:
                reason = f"not JSON ({error})"
            except RecursionError:
                raise DataFormatError(f"{where}: objects stand too deep in each other to be facts") from None
            else:
                if end < len(self._text) or not self._read(_CHUNK):  # a number may go on in the next chunk
                    value = self._text[self._start : end]
                    self._start = end
                    return value
                continue
            # Twice as much each time, so that a broken value is not tried for ever.
            if len(self._text) - self._start > _LONGEST or not self._read(size):
                raise DataFormatError(f"{where}: {reason}")
            size *= 2

    def _read(self, size: int) -> bool:
        """Read on, drop what was used, and return whether there was more."""
        chunk = self._file.read(size)
        self._text, self._start = self._text[self._start :] + chunk, 0
        return bool(chunk)


def _read_parquet(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet  # pyright: ignore[reportMissingImports, reportMissingTypeStubs] - an extra
    except ImportError as error:
        raise MissingDependencyError(f"{path} is read by pyarrow: pip install 'kecore[data]'") from error
    number = 0
    try:
        for batch in cast(Any, pyarrow.parquet).ParquetFile(path).iter_batches(_ROWS):
            for row in rows_of(batch):
                number += 1
                yield f"{name} row {number}", row
    except Exception as error:  # noqa: BLE001 - what pyarrow cannot turn into Python raises whatever the type raises
        raise DataFormatError(f"{path}: a broken Parquet file ({error}), or a column that cannot be read") from None
