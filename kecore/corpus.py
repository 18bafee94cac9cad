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

__all__ = ["Corpus", "TextSample"]

_LONGEST = 4000  # characters of a passage; longer texts are cut at white space
_SHORTEST = 40


@dataclass(frozen=True, slots=True)
class TextSample:
    """Passages that were drawn from a corpus in one reading, with what identifies them.

    Args:
        passages: the passages, in random order.
        digest: digest of all text of the corpus, not of the passages alone.
        sources: the files or data sets of the corpus.
        seed: seeded the choice.
    """

    passages: Sequence[str]
    digest: str
    sources: tuple[str, ...]
    seed: int


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
        """Make a corpus of files or hub data sets.

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

    def sample(self, count: int, seed: int) -> TextSample:
        """Draw ``count`` passages evenly from the corpus, and digest all its text on the way.

        Reservoir sampling: one pass, and memory for ``count`` passages however large the corpus is.

        Raises:
            DataFormatError: the corpus holds no text, or a record has no ``text``.
        """
        rng = random.Random(seed)  # noqa: S311 - sampling, not cryptography
        text_hash = hashlib.sha256()
        reservoir: list[str] = []
        for index, passage in enumerate(self.passages()):
            text_hash.update(passage.encode())
            if len(reservoir) < count:
                reservoir.append(passage)
                continue
            # Passage number `index` stays with probability count / (index + 1), in the place of any other.
            slot = rng.randrange(index + 1)
            if slot < count:
                reservoir[slot] = passage
        if not reservoir:
            raise DataFormatError(
                f"{', '.join(self.sources)}: no passages of at least {_SHORTEST} characters; is this text?"
            )
        rng.shuffle(reservoir)
        return TextSample(reservoir, text_hash.hexdigest()[:32], self.sources, seed)

    def passages(self) -> Iterator[str]:
        """Yield paragraphs of a useful length, in order."""
        for source in self.sources:
            texts = _read_hub(source) if source.startswith("hf:") else _read_file(Path(source))
            for text in texts:
                for paragraph in text.split("\n\n"):
                    yield from _cut(" ".join(paragraph.split()))


def _cut(text: str) -> Iterator[str]:
    """Yield pieces of at most the longest length, cut at white space; a rest that is too short is dropped."""
    while len(text) > _LONGEST:
        end = text.rfind(" ", 1, _LONGEST)
        if end <= 0:
            end = _LONGEST  # a word without end
        yield text[:end]
        text = text[end:].strip()
    if len(text) >= _SHORTEST:
        yield text


def _read_file(path: Path) -> Iterator[str]:
    """Yield the texts of a file, by what its name says that it holds."""
    suffixes = [s for s in path.suffixes if s != ".gz"]
    with _open(path) as file:
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


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _text(record: Any, where: str) -> str:
    """Return the text of a record; ``where`` says in an error which record it is."""
    if isinstance(record, str):
        return record
    if isinstance(record, dict):
        for name in ("text", "Text"):  # the second as in the ME-PPL texts (arXiv 2402.09656)
            if isinstance(record.get(name), str):
                return record[name]
    keys: Sequence[str] = sorted(record) if isinstance(record, dict) else [type(record).__name__]
    raise DataFormatError(f"{where}: expected a record with a 'text' field, got {', '.join(map(str, keys))}")


def _read_hub(source: str) -> Iterator[str]:
    """Yield the texts of a data set of the Hugging Face hub, streamed."""
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
