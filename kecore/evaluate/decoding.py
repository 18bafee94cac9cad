"""From the bytes of a file to its text, or to its rows where it is no text: spreadsheets, Parquet and Arrow tables."""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kecore.api.errors import ConfigError, DataFormatError
from kecore.evaluate.columnar import import_arrow, read_arrow, read_parquet
from kecore.evaluate.spreadsheets import read_spreadsheet

__all__ = ["Decoded", "decode", "kind_of", "refuse_foreign"]

_PACKED = (".gz", ".zst")
_ARROW = (b"ARROW1", b"\xff\xff\xff\xff")
_ZSTD = b"\x28\xb5\x2f\xfd"
_MARKS = (  # of four bytes before of two, which begin alike
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
)
_UTF_32 = tuple(mark for mark, name in _MARKS if name == "utf-32")
# What other files begin with, and what they are: none of them holds facts.
_FOREIGN = (
    (b"GGUF", "a GGUF model"),
    (b"\x80\x02", "a Python pickle, such as a torch checkpoint"),
    (b"\x80\x03", "a Python pickle, such as a torch checkpoint"),
    (b"\x80\x04", "a Python pickle, such as a torch checkpoint"),
    (b"\x80\x05", "a Python pickle, such as a torch checkpoint"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "an HDF5 file, such as a Keras model"),
    (b"\xff\xd8\xff", "an image"),
    (b"\x89PNG", "an image"),
    (b"GIF8", "an image"),
    (b"RIFF", "an image or a sound"),
    (b"BM", "an image"),
    (b"II*\x00", "an image"),
    (b"MM\x00*", "an image"),
    (b"\x00\x00\x01\x00", "an image"),
    (b"ID3", "a sound"),
    (b"OggS", "a sound"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
    (b"BZh", "a file packed by bzip2; unpack it"),
    (b"\xfd7zXZ", "a file packed by xz; unpack it"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (b"Rar!", "a RAR archive; unpack it"),
    (b"version https://git-lfs", "a pointer of Git LFS; fetch the file with git lfs pull"),
    (b"<!doctype", "a web page"),
    (b"<html", "a web page"),
    (b"<?xml", "an XML file; turn it into CSV or JSON"),
    (b"{\\rtf", "a document in RTF; save it as plain text"),
    (b"%PDF", "a PDF document"),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word file; save it as .xlsx or CSV"),
    (b"SQLite format 3", "an SQLite database, such as a store of `kecore bench`"),
)
_TEXTS = (b"BM", b"MZ", b"ID3", b"RIFF")
"""Beginnings that a text may have as well: they count only where bytes follow that no text has."""
_IN_ARCHIVES = (  # what zip archives that are no spreadsheet hold, and what they are
    ("data.pkl", "a torch checkpoint"),
    (".npy", "NumPy arrays, such as key statistics"),
    ("word/document.xml", "a Word document"),
    ("ppt/presentation.xml", "a PowerPoint file"),
    ("xl/workbook.bin", "a binary Excel file; save it as .xlsx or CSV"),
    ("content.xml", "an OpenDocument file; save it as .xlsx or CSV"),
    (".iwa", "a file of Apple's Numbers or Pages; export it as .xlsx or CSV"),
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


def decode(stored: bytes, path: Path, split: str | None = None) -> Decoded:
    """Read the bytes of a file of facts.

    Args:
        stored: the bytes, which may be packed by gzip or Zstandard.
        path: the file, for its suffix and for messages.
        split: the sheet of a spreadsheet that has several; nothing of a text is left out.

    Raises:
        DataFormatError: the bytes are those of something else, broken, or text in an unknown encoding; a spreadsheet
            has several sheets.
        ConfigError: there is no such sheet, or a split was asked of a Parquet or Arrow file.
        MissingDependencyError: a library that reads it is not installed.
    """
    content = _unpack(stored, path)
    if not content.strip(b"\xef\xbb\xbf\xff\xfe \t\r\n"):
        raise DataFormatError(f"{path} is empty; expected {_FORMATS}")
    refuse_foreign(content, path)
    if content.startswith(b"PK\x03\x04"):
        _refuse_other_archives(content, path)
        return Decoded(None, read_spreadsheet(content, path, split), content)
    if split is not None and content.startswith((b"PAR1", *_ARROW)):
        raise ConfigError(f"split '{split}' was asked of the single file {path}; give its folder, or leave it out")
    if content.startswith(b"PAR1"):
        return Decoded(None, read_parquet(content, path), content)
    if content.startswith(_ARROW):
        return Decoded(None, read_arrow(content, path), content)
    return Decoded(_decode_text(content, path), (), content)


def _unpack(stored: bytes, path: Path) -> bytes:
    if stored.startswith(b"\x1f\x8b"):
        try:
            return gzip.decompress(stored)
        except (OSError, EOFError, zlib.error) as error:
            raise DataFormatError(f"{path}: the gzip data is broken ({error}); copy the file again") from None
    if stored.startswith(_ZSTD):
        arrow = import_arrow(path)
        try:
            return bytes(arrow.CompressedInputStream(arrow.BufferReader(stored), "zstd").read())
        except OSError as error:
            raise DataFormatError(f"{path}: the Zstandard data is broken ({error}); copy the file again") from None
    return stored


def refuse_foreign(content: bytes, path: Path) -> None:
    """Refuse files that hold no facts, which people give by mistake: a model, an image, a document.

    Args:
        content: the file's bytes, or its first 512 at least.
        path: the file, for the message.

    Raises:
        DataFormatError: says what the file is.
    """
    what = _foreign_kind(content)
    if what is not None:
        raise DataFormatError(f"{path}: expected facts as {_FORMATS}, got {what}")


def _foreign_kind(content: bytes) -> str | None:
    """Return what a file is that holds no facts; None where it may hold some."""
    head = content.lstrip()[:16].lower() if content.lstrip()[:1] == b"<" else content
    for beginning, what in _FOREIGN:
        if head.startswith(beginning) and (beginning not in _TEXTS or b"\x00" in content[:64]):
            return what
    # A .safetensors file begins with the length of its header, which is JSON.
    if content[8:9] == b"{" and b"\x00" in content[:8] and not content.startswith(_UTF_32):
        return "a .safetensors file, such as a model or an edit"
    return "a tar archive; unpack it" if content[257:262] == b"ustar" else None


def _refuse_other_archives(content: bytes, path: Path) -> None:
    """Refuse zip archives that are no spreadsheet, as torch and Word write them."""
    try:
        names = zipfile.ZipFile(io.BytesIO(content)).namelist()
    except zipfile.BadZipFile as error:
        raise DataFormatError(f"{path}: a broken zip archive ({error}); copy it again") from None
    if "xl/workbook.xml" in names:
        return
    what = "a zip archive; unpack it, and give the file in it"
    for ending, kind in _IN_ARCHIVES:
        if any(name.endswith(ending) for name in names):
            what = kind
            break
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
