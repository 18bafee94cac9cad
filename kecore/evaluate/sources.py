"""Where records lie: a file, a folder of files, or the Hugging Face hub; read into JSON objects with their places.

Nothing here knows a layout; :mod:`kecore.evaluate.records` turns the objects into records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, cast

from kecore.api.errors import ConfigError, DataFormatError, HubError, MissingDependencyError
from kecore.evaluate.columnar import without_bytes
from kecore.evaluate.decoding import decode, kind_of, refuse_foreign
from kecore.evaluate.parsing import read_objects
from kecore.evaluate.streams import open_stream
from kecore.hub import HubReference, download, explain_hub_errors, is_reference

__all__ = ["Document", "open_source"]

_SUMS = "SHA256SUMS"
"""A list of digests beside the data, as ``sha256sum`` writes it."""

_SUFFIXES = (
    ".json", ".jsonl", ".ndjson", ".yaml", ".yml", ".csv", ".tsv", ".tab", ".xlsx", ".parquet", ".arrow", ".feather",
)  # fmt: skip
_HEAD = 512  # bytes that tell what a file is
_SPLITS = {
    "train": "train", "training": "train", "test": "test", "eval": "eval", "edit": "edit",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
}  # fmt: skip


class Document(NamedTuple):
    """One file, or one split of a hub data set.

    Args:
        name: what messages call it; inside a folder its path there, with ``/``.
        text: its text; None where a library gave objects.
        rows: those objects.
        digests: hex SHA-256 of the bytes as stored, and of the text where that was compressed.
        stream: begins to read the objects of a large file, which is not held as a whole.
        split: the split to be taken out of the text; None where it was taken, or none was asked for.
    """

    name: str
    text: str | None
    rows: Sequence[dict[str, Any]]
    digests: tuple[str, ...]
    stream: Callable[[], Iterator[tuple[str, Any]]] | None = None
    split: str | None = None

    def objects(self) -> Iterator[tuple[str, Any]]:
        """Read what the document holds, each with its place, read one by one.

        Raises:
            DataFormatError: it is empty or broken.
        """
        if self.stream is not None:
            return self.stream()
        if self.text is None:
            return ((f"{self.name} row {number}", row) for number, row in enumerate(self.rows, 1))
        return read_objects(self.text, self.name, kind_of(Path(self.name)))


def open_source(source: str | Path, split: str | None, stream: bool = False) -> list[Document]:
    """Read the documents that a source consists of.

    Args:
        source: a file, a folder, ``hf:OWNER/NAME[@REVISION][:CONFIG]``, or ``hf:OWNER/NAME[@REVISION]/path`` of a file
            or folder.
        split: of a folder: only files whose names hold this word (``val``, ``valid`` and ``dev`` mean
            ``validation``); of a hub data set: its split. ``train+test`` is both. Of a spreadsheet: its sheet. Of a
            text, it is left to whoever reads the document.
        stream: large files may come without their text and rows, as a stream of objects.

    Raises:
        DataFormatError: a file cannot be read, or a ``SHA256SUMS`` beside or above it has another digest for it; a
            folder holds no files, or those of several splits.
        HubError: the hub cannot be reached, or has no such data set.
        MissingDependencyError: a hub data set is asked for and the ``datasets`` library is not installed.
        ConfigError: ``split`` selects nothing, or is given for a Parquet or Arrow file.
    """
    if is_reference(source):
        return _hub(HubReference.parse(source), split, stream)
    path = Path(source)
    if path.is_dir():
        return _folder(path, split)
    return [_file(path, path.name, split, stream)]


def _no_split(split: str | None, file: str | Path) -> None:
    if split is not None:
        raise ConfigError(f"split '{split}' was asked of the single file {file}; give its folder, or leave it out")


def _folder(folder: Path, split: str | None) -> list[Document]:
    if (folder / "config.json").is_file() and (any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))):
        raise DataFormatError(
            f"{folder}: expected facts, got the folder of a model; give the model first, then the facts"
        )
    if (folder / "edit.safetensors").is_file():
        raise DataFormatError(f"{folder}: expected facts, got the folder of an edit; `kecore inspect` shows its facts")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and kind_of(path) in _SUFFIXES)
    if not files:
        raise DataFormatError(f"{folder}: no {', '.join(_SUFFIXES)} files in this folder (nor packed ones)")
    splits = {path: _split(path) for path in files}
    known = sorted({name for name in splits.values() if name})
    if split is None and len(known) > 1:
        raise DataFormatError(
            f"{folder} holds the splits {', '.join(known)}; choose one by --split NAME (in Python split=)"
        )
    if split is not None:
        wanted = {_SPLITS.get(word.casefold(), word.casefold()): word for word in split.split("+")}
        files = [path for path in files if splits[path] in wanted]
        if missing := [word for name, word in wanted.items() if name not in known]:
            raise ConfigError(f"{folder} holds no split '{missing[0]}'; its splits: {', '.join(known) or 'none'}")
    return [_file(path, path.relative_to(folder).as_posix()) for path in files]


def _split(path: Path) -> str:
    words = re.split(r"[^a-z]+", path.name.partition(".")[0].casefold())
    return next((_SPLITS[word] for word in reversed(words) if word in _SPLITS), "")


def _file(path: Path, name: str, split: str | None = None, stream: bool = False) -> Document:
    large = open_stream(path, name) if stream else None
    if large is not None:
        _no_split(split, path)
        _check_listed(path, large.digests[0])
        return Document(name, None, (), large.digests, large.read)
    try:
        with path.open("rb") as file:
            refuse_foreign(file.read(_HEAD), path)  # before gigabytes of a model are read
        stored = path.read_bytes()
    except OSError as error:
        raise DataFormatError(
            f"{path}: cannot be read ({error.strerror}); give a JSON, JSONL, YAML, CSV, .xlsx, Parquet or Arrow file, "
            "a folder, or hf:OWNER/NAME"
        ) from None
    decoded = decode(stored, path, split)
    digests = dict.fromkeys(sha256(data).hexdigest() for data in (stored, decoded.content))
    _check_listed(path, next(iter(digests)))
    rest = None if decoded.text is None else split  # a sheet was taken already
    return Document(name, decoded.text, decoded.rows, tuple(digests), split=rest)


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


def _hub(reference: HubReference, split: str | None, stream: bool) -> list[Document]:
    if not reference.inside:
        return [_hub_rows(reference, split)]
    if kind_of(Path(reference.inside)) not in _SUFFIXES:
        return _folder(_fetch_folder(reference), split)
    _no_split(split, str(reference))
    return [_file(download(reference, reference.inside, repo_type="dataset"), reference.inside, stream=stream)]


def _fetch_folder(reference: HubReference) -> Path:
    """Fetch a folder of a data set's repository with its files."""
    from huggingface_hub import snapshot_download

    wanted = [f"{reference.inside}/*"]
    with explain_hub_errors(str(reference)):
        snapshot = snapshot_download(
            reference.repository, repo_type="dataset", revision=reference.revision, allow_patterns=wanted
        )
    folder = Path(snapshot) / reference.inside
    if not folder.is_dir():
        repository = replace(reference, inside="")
        raise HubError(f"{repository} has no folder '{reference.inside}'; look up its files on the hub")
    return folder


def _hub_rows(reference: HubReference, split: str | None) -> Document:
    where = replace(reference, config=None)
    try:
        import datasets  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise MissingDependencyError(
            f"{where} needs the datasets library: pip install 'kecore[data]'; a single file of the repository can "
            f"be read without it, as {where}/path/to/file.json"
        ) from error
    library = cast(Any, datasets)
    with explain_hub_errors(str(where), (library.exceptions.DatasetsError,)):
        dataset = library.load_dataset(reference.repository, reference.config, split=split, revision=reference.revision)
    if hasattr(dataset, "keys"):
        splits = list(dataset)
        if len(splits) > 1:
            raise ConfigError(
                f"{where} has the splits {', '.join(splits)}; choose one by --split NAME (in Python split=)"
            )
        dataset = dataset[splits[0]]
    rows: list[dict[str, Any]] = [without_bytes(dict(row)) for row in dataset]
    text = json.dumps(rows, sort_keys=True, ensure_ascii=False, default=str)
    return Document(str(where), None, rows, (sha256(text.encode()).hexdigest(),))
