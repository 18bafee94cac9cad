"""Text that key statistics are collected from: local files or a Hugging Face data set."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from kecore.api.errors import DataFormatError, MissingDependencyError

__all__ = ["Corpus"]

_LONGEST = 4000  # characters of a passage; longer texts are cut at white space
_SHORTEST = 40


@dataclass(frozen=True, slots=True)
class Corpus:
    """Passages of text with the identity of where they came from.

    Args:
        sources: paths of ``.txt`` (one passage a line), ``.jsonl`` or ``.json`` files (plain or ``.gz``; records hold a
            ``text`` or ``Text`` field), or ``hf:NAME[:CONFIG[:SPLIT]]`` for a data set of the Hugging Face hub.
    """

    sources: tuple[str, ...]

    @classmethod
    def of(cls, *sources: str | Path) -> Corpus:
        """A corpus of files or hub data sets.

        Raises:
            DataFormatError: a file does not exist, or there is none.
        """
        if not sources:
            raise DataFormatError("no text was given; pass at least one file or hf:NAME")
        for source in map(str, sources):
            if not source.startswith("hf:") and not Path(source).is_file():
                raise DataFormatError(
                    f"{source}: no such text file; pass a .txt or .jsonl file, or hf:NAME[:CONFIG[:SPLIT]]"
                )
        return cls(tuple(map(str, sources)))

    def sample(self, count: int, seed: int) -> tuple[list[str], str]:
        """``count`` passages spread evenly over the corpus, and the digest of all its text.

        Reservoir sampling: one pass, and memory for ``count`` passages however large the corpus is.

        Raises:
            DataFormatError: the corpus holds no text, or a record has no ``text``.
        """
        rng = random.Random(seed)  # noqa: S311 - sampling, not cryptography
        h = hashlib.sha256()
        kept: list[str] = []
        for seen, passage in enumerate(self.passages()):
            h.update(passage.encode())
            if len(kept) < count:
                kept.append(passage)
            elif (place := rng.randrange(seen + 1)) < count:
                kept[place] = passage
        if not kept:
            raise DataFormatError(
                f"{', '.join(self.sources)}: no passages of at least {_SHORTEST} characters; is this text?"
            )
        rng.shuffle(kept)
        return kept, h.hexdigest()[:32]

    def passages(self) -> Iterator[str]:
        """Paragraphs of a useful length, in order."""
        for source in self.sources:
            texts = _hub(source) if source.startswith("hf:") else _file(Path(source))
            for text in texts:
                for paragraph in text.split("\n\n"):
                    yield from _cut(" ".join(paragraph.split()))


def _cut(text: str) -> Iterator[str]:
    while len(text) > _LONGEST:
        place = text.rfind(" ", 1, _LONGEST)
        place = place if place > 0 else _LONGEST
        yield text[:place]
        text = text[place:].strip()
    if len(text) >= _SHORTEST:
        yield text


def _file(path: Path) -> Iterator[str]:
    suffixes = [s for s in path.suffixes if s != ".gz"]
    with _opened(path) as file:
        try:
            if suffixes and suffixes[-1] == ".jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _text(json.loads(line), f"{path}, line {number}")
            elif suffixes and suffixes[-1] == ".json":
                records: Any = json.load(file)
                if not isinstance(records, list):
                    raise DataFormatError(f"{path}: expected a list of records, got {type(records).__name__}")
                for number, record in enumerate(records):
                    yield _text(record, f"{path}, record {number}")
            else:
                yield from file
        except (UnicodeDecodeError, json.JSONDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataFormatError(f"{path}: cannot be read as text: {error}") from error


def _opened(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _text(record: Any, where: str) -> str:
    if isinstance(record, str):
        return record
    if isinstance(record, dict):
        for name in ("text", "Text"):  # the second as in the ME-PPL texts (arXiv 2402.09656)
            if isinstance(record.get(name), str):
                return record[name]
    keys: Sequence[str] = sorted(record) if isinstance(record, dict) else [type(record).__name__]
    raise DataFormatError(f"{where}: expected a record with a 'text' field, got {', '.join(map(str, keys))}")


def _hub(source: str) -> Iterator[str]:
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise MissingDependencyError(
            f"{source} needs the datasets library: pip install 'kecore[data]', or pass a local text file"
        ) from error
    name, config, split, *_ = [*source.removeprefix("hf:").split(":"), None, None]
    load: Any = load_dataset
    for number, record in enumerate(load(name, config, split=split or "train", streaming=True)):
        yield _text(record, f"{source}, record {number}")
