"""Where records lie: a file, a folder of files, or the Hugging Face hub; read into JSON objects with their places.

Nothing here knows a layout; :mod:`kecore.evaluate.records` turns the objects into records.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, cast

from kecore.api.errors import ConfigError, DataFormatError, HubError, MissingDependencyError

__all__ = ["HUB", "Document", "open_source"]

HUB = "hf:"
"""What a reference to the hub begins with: ``hf:OWNER/NAME[@REVISION][:CONFIG]``,
``hf:OWNER/NAME[@REVISION]/path/to/file.json``, or ``hf:OWNER/NAME[@REVISION]/path/to/folder``."""

_REFERENCE = re.compile(
    r"(?P<name>[^/@:]+/[^/@:]+)(@(?P<revision>refs/(pr|convert)/[^/@:]+|[^/@:]+))?"
    r"(/(?P<file>[^:]+)|:(?P<config>.+))?"
)
_SUMS = "SHA256SUMS"
"""A list of digests beside the data, as ``sha256sum`` writes it."""

_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
_SPLITS = {
    "train": "train", "training": "train", "test": "test", "eval": "eval", "edit": "edit",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
}  # fmt: skip


class Document(NamedTuple):
    """One file, or one split of a hub data set.

    Args:
        name: what messages call it; inside a folder its path there, with ``/``.
        text: its text; None where the hub's library gave objects.
        rows: those objects.
        digests: hex SHA-256 of the bytes as stored, and of the text where that was compressed.
    """

    name: str
    text: str | None
    rows: Sequence[dict[str, Any]]
    digests: tuple[str, ...]

    def objects(self) -> Iterator[tuple[str, Any]]:
        """Read what the document holds, each with its place, read one by one.

        Raises:
            DataFormatError: it is empty or broken.
        """
        if self.text is None:
            return ((f"{self.name} row {i}", row) for i, row in enumerate(self.rows, 1))
        kind = _kind(Path(self.name))
        if kind in (".csv", ".tsv"):
            return _table(self.text, self.name, "," if kind == ".csv" else "\t")
        return _json_objects(self.text, self.name)


def open_source(source: str | Path, split: str | None) -> list[Document]:
    """Read the documents that a source consists of.

    Args:
        source: a file, a folder, or ``hf:...`` (see :data:`HUB`).
        split: of a folder: only files whose names hold this word (``val``, ``valid`` and ``dev`` mean
            ``validation``); of a hub data set: its split. ``train+test`` is both.

    Raises:
        DataFormatError: a file cannot be read, or a ``SHA256SUMS`` beside or above it has another digest for it; a
            folder holds no files, or those of several splits.
        HubError: the hub cannot be reached, or has no such data set.
        MissingDependencyError: a hub data set is asked for and the ``datasets`` library is not installed.
        ConfigError: ``split`` selects nothing, or is given for a single file.
    """
    if str(source).startswith(HUB):
        return _hub(str(source).removeprefix(HUB), split)
    path = Path(source)
    if path.is_dir():
        return _folder(path, split)
    _no_split(split, path)
    return [_file(path, path.name)]


def _no_split(split: str | None, file: str | Path) -> None:
    if split is not None:
        raise ConfigError(f"split '{split}' was asked of the single file {file}; give its folder, or leave it out")


def _folder(folder: Path, split: str | None) -> list[Document]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _kind(path) in _SUFFIXES)
    if not files:
        raise DataFormatError(f"{folder}: no {', '.join(_SUFFIXES)} files in this folder (nor gzipped ones)")
    splits = {path: _split(path) for path in files}
    known = sorted({name for name in splits.values() if name})
    if split is None and len(known) > 1:
        raise DataFormatError(f"{folder} holds the splits {', '.join(known)}; choose one with split=")
    if split is not None:
        wanted = {_SPLITS.get(word.casefold(), word.casefold()): word for word in split.split("+")}
        files = [path for path in files if splits[path] in wanted]
        if missing := [word for name, word in wanted.items() if name not in known]:
            raise ConfigError(f"{folder} holds no split '{missing[0]}'; its splits: {', '.join(known) or 'none'}")
    return [_file(path, path.relative_to(folder).as_posix()) for path in files]


def _split(path: Path) -> str:
    words = re.split(r"[^a-z]+", path.name.partition(".")[0].casefold())
    return next((_SPLITS[word] for word in reversed(words) if word in _SPLITS), "")


def _kind(path: Path) -> str:
    """Return the suffix that tells how to read a file, without ``.gz``."""
    return next((suffix for suffix in reversed(path.suffixes) if suffix != ".gz"), "").casefold()


def _file(path: Path, name: str) -> Document:
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise DataFormatError(
            f"{path}: cannot be read ({error.strerror}); give a JSON, JSONL or CSV file, a folder, or hf:OWNER/NAME"
        ) from None
    try:
        content = gzip.decompress(stored) if stored.startswith(b"\x1f\x8b") else stored
        text = content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise DataFormatError(f"{path}: the gzip data is broken ({error}); copy the file again") from None
    except UnicodeDecodeError as error:
        raise DataFormatError(f"{path}: not UTF-8 text ({error}); convert it to UTF-8") from None
    digests = dict.fromkeys(sha256(data).hexdigest() for data in (stored, content))
    _check_listed(path, next(iter(digests)))
    return Document(name, text, (), tuple(digests))


def _check_listed(path: Path, digest: str) -> None:
    """Hold a file's digest against the nearest ``SHA256SUMS`` that names it, in its folder or above."""
    for folder in path.absolute().parents:
        listing = folder / _SUMS
        if not listing.is_file():
            continue
        name = path.absolute().relative_to(folder).as_posix()
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            expected, _, listed = line.partition(" ")
            if listed.lstrip(" *").removeprefix("./") != name:
                continue
            if expected.casefold() != digest:
                raise DataFormatError(
                    f"{path}: expected SHA-256 {expected} as {listing} lists, got {digest}; the file was changed or "
                    "cut short: get it again, or correct the list"
                )
            return


def _json_objects(text: str, name: str) -> Iterator[tuple[str, Any]]:
    """Read the values of a JSON array, of one JSON object, or of the lines of a JSONL file, with their places."""
    start = text.lstrip()
    if not start:
        raise DataFormatError(f"{name} is empty; expected JSON or JSONL records")
    if start[0] == "[":
        for i, value in enumerate(_json(text, name), 1):
            yield f"{name} record {i}", value
        return
    try:
        json.loads(start.partition("\n")[0])
    except ValueError:
        # The first line is no object by itself: either one object takes many lines, or the line is bad.
        with suppress(ValueError):
            yield name, json.loads(text)
            return
    for i, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{name} line {i}", _json(line, f"{name} line {i}")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataFormatError(f"{where}: not JSON ({error}); expected a JSON array or one object a line") from None


def _table(text: str, name: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    """Read the rows of a table with a header; empty cells are missing fields, JSON lists and objects are read."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        if not any(header):
            raise DataFormatError(f"{name} is empty; expected a header line and records")
        if len(set(header)) < len(header):
            twice = next(column for column in header if header.count(column) > 1)
            raise DataFormatError(f"{name}: the header names the column '{twice}' twice")
        for i, row in enumerate(rows, 1):
            if not any(row):
                continue
            where = f"{name} record {i}"
            if len(row) != len(header):
                raise DataFormatError(f"{where}: expected {len(header)} cells as in the header, got {len(row)}")
            yield where, {column: _cell(cell) for column, cell in zip(header, row, strict=True) if cell}
    except csv.Error as error:
        raise DataFormatError(f"{name} line {rows.line_num}: not a table ({error})") from None


def _cell(text: str) -> Any:
    if text[:1] in "[{":
        with suppress(ValueError):
            return json.loads(text)
    return text


def _hub(reference: str, split: str | None) -> list[Document]:
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise ConfigError(
            f"hf:{reference}: expected hf:OWNER/NAME[@REVISION][:CONFIG], hf:OWNER/NAME[@REVISION]/path/to/file.json, "
            "or hf:OWNER/NAME[@REVISION]/path/to/folder"
        )
    name, revision = match["name"], match["revision"]
    if not match["file"]:
        return [_hub_rows(name, revision, match["config"], split)]
    inside = match["file"].rstrip("/")
    if _kind(Path(inside)) not in _SUFFIXES:
        return _folder(_fetched(name, revision, inside, folder=True), split)
    _no_split(split, f"hf:{reference}")
    return [_file(_fetched(name, revision, inside), inside)]


def _fetched(repository: str, revision: str | None, inside: str, folder: bool = False) -> Path:
    """Fetch a file of a data set's repository, or a folder with its files, on this machine."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if not folder:
            return Path(hf_hub_download(repository, inside, repo_type="dataset", revision=revision))
        wanted = [f"{inside}/*"]
        snapshot = Path(snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise _unreachable(f"hf:{repository}{_at(revision)}/{inside}", error) from error
    if not (snapshot / inside).is_dir():
        raise HubError(f"hf:{repository}{_at(revision)} has no folder '{inside}'; look up its files on the hub")
    return snapshot / inside


def _at(revision: str | None) -> str:
    return f"@{revision}" if revision else ""


def _hub_rows(name: str, revision: str | None, config: str | None, split: str | None) -> Document:
    where = name + _at(revision)
    try:
        import datasets  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise MissingDependencyError(
            f"hf:{where} needs the datasets library: pip install 'kecore[data]'; a single file of the repository can "
            f"be read without it, as hf:{where}/path/to/file.json"
        ) from error
    library = cast(Any, datasets)
    try:
        dataset = library.load_dataset(name, config, split=split, revision=revision)
    except (OSError, ValueError, library.exceptions.DatasetsError) as error:  # names, splits, connections, tables
        raise _unreachable(f"hf:{where}", error) from error
    if hasattr(dataset, "keys"):
        splits = list(dataset)
        if len(splits) > 1:
            raise ConfigError(f"hf:{where} has the splits {', '.join(splits)}; choose one with split=")
        dataset = dataset[splits[0]]
    rows: list[dict[str, Any]] = [dict(row) for row in dataset]
    text = json.dumps(rows, sort_keys=True, ensure_ascii=False, default=str)
    return Document(f"hf:{where}", None, rows, (sha256(text.encode()).hexdigest(),))


def _unreachable(what: str, error: Exception) -> HubError:
    reason = str(error).partition("\n")[0]
    return HubError(
        f"{what} cannot be had from the Hugging Face hub: {type(error).__name__}: {reason}; check the name and the "
        "connection, or download the file and give its path"
    )
