"""Reading fact files: published benchmarks and kecore's own JSONL, the layout recognised by content."""

from __future__ import annotations

import gzip
import json
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, cast, overload

from kecore.errors import ConfigError, DataFormatError, KecoreWarning
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import LAYOUTS, Layout
from kecore.types import EditRecord, EditRequest

__all__ = ["RecordSet", "Skipped", "load_records"]

_SAMPLE = 5
"""Objects looked at to recognise a layout: more than one, so that a bad first line gets its own error."""


class Skipped(NamedTuple):
    """A record of a file that could not be represented, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class RecordSet(Sequence[EditRecord]):
    """The records of one file, with what is needed to say which file that was.

    Args:
        records: in file order.
        skipped: records that are not among them.
        format: name of the recognised layout.
        path: the file.
        sha256: digest of the file's bytes as stored (of the ``.gz`` where it is one).
    """

    records: tuple[EditRecord, ...]
    skipped: tuple[Skipped, ...]
    format: str
    path: Path
    sha256: str

    @property
    def requests(self) -> list[EditRequest]:
        """The edits, without their probes."""
        return [record.request for record in self.records]

    @overload
    def __getitem__(self, index: int) -> EditRecord: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[EditRecord, ...]: ...
    def __getitem__(self, index: int | slice) -> EditRecord | tuple[EditRecord, ...]:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)


def load_records(
    path: str | Path,
    *,
    limit: int | None = None,
    format: str | None = None,
    skip_errors: bool | None = None,
) -> RecordSet:
    """Read a facts file: JSON or JSONL, plain or gzipped, in any layout of :data:`formats.LAYOUTS`.

    Args:
        path: the file.
        limit: only the first so many records of the file; skipped ones count, so that a limit means the
            same records for everyone.
        format: name of the layout; by default it is recognised by the fields.
        skip_errors: leave out records that cannot be represented and list them in ``skipped`` (with one
            warning), instead of raising. By default so for published data sets, whose few broken records
            no user can mend, and not for kecore's own layout.

    Raises:
        DataFormatError: the file cannot be read, its layout is unknown, no record is usable, or a record
            is bad and errors are not skipped; names file, line (or record) and field.
        ConfigError: ``limit`` is below 1, or ``format`` names no layout.

    Examples:
        >>> from kecore.data import path
        >>> records = load_records(path("counterfact_sample.jsonl"), limit=2)
        >>> records.format, len(records), len(records[0].neighbourhood)
        ('kecore', 2, 10)
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}")
    content = _read(path)
    objects = _objects(_text(path, content), path.name)
    head = list(islice(objects, _SAMPLE))
    layout = _layout([value for _, value in head], format, path.name)
    places = _expand(layout, chain(head, objects))
    skip = not layout.strict if skip_errors is None else skip_errors
    records, skipped = _parse(layout, islice(places, limit), skip)
    if not records:
        raise DataFormatError(f"no record of {path.name} is usable; the first: {skipped[0].reason}")
    if skipped:
        warnings.warn(
            f"{len(skipped)} of {len(records) + len(skipped)} records of {path.name} cannot be represented "
            f"and were left out (RecordSet.skipped lists them); the first: {skipped[0].reason}",
            KecoreWarning,
            stacklevel=2,
        )
    return RecordSet(tuple(records), tuple(skipped), layout.name, path, sha256(content).hexdigest())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataFormatError(f"{path}: cannot be read ({error.strerror}); give a JSON or JSONL file") from None


def _text(path: Path, content: bytes) -> str:
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise DataFormatError(f"{path}: the gzip data is broken ({error}); copy the file again") from None
    except UnicodeDecodeError as error:
        raise DataFormatError(f"{path}: not UTF-8 text ({error}); convert it to UTF-8") from None


def _objects(text: str, name: str) -> Iterator[tuple[str, Any]]:
    """The values of a JSON array, of one JSON object, or of the lines of a JSONL file, with their places."""
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


def _layout(sample: Sequence[Any], format: str | None, name: str) -> Layout:
    if not sample:
        raise DataFormatError(f"{name} holds no records")
    if format is not None:
        for layout in LAYOUTS:
            if layout.name == format:
                return layout
        raise ConfigError(f"unknown format '{format}'; known: {', '.join(v.name for v in LAYOUTS)}")
    objects = [cast("Mapping[str, Any]", value) for value in sample if isinstance(value, Mapping)]
    for layout in LAYOUTS:
        if any(layout.detect(value) for value in objects):
            return layout
    found = ", ".join(str(key) for key in objects[0]) if objects else type(sample[0]).__name__
    known = "; ".join(f"{layout.name} ({layout.describes})" for layout in LAYOUTS)
    raise DataFormatError(f"{name}: unknown layout, its first record has: {found}. Known layouts: {known}")


def _expand(layout: Layout, places: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    if layout.expand is None:
        yield from places
        return
    for where, document in places:
        for i, value in enumerate(layout.expand(Fields(document, where)), 1):
            yield f"{where} record {i}", value


def _parse(layout: Layout, places: Iterable[tuple[str, Any]], skip: bool) -> tuple[list[EditRecord], list[Skipped]]:
    records: list[EditRecord] = []
    skipped: list[Skipped] = []
    seen: dict[str, str] = {}
    for where, value in places:
        try:
            record = layout.parse(Fields(value, where))
            id = record.request.id
            if id in seen and layout.strict:
                raise DataFormatError(f"{where}: field 'id' repeats '{id}' of {seen[id]}; ids must differ")
        except DataFormatError as error:
            if not skip:
                raise
            skipped.append(Skipped(where, str(error)))
            continue
        id = _unique(id, seen)
        seen[id] = where
        records.append(replace(record.with_id(id), source=record.source or f"{layout.name}: {where}"))
    return records, skipped


def _unique(id: str, seen: Mapping[str, str]) -> str:
    """``id``, or ``id-2``, ``id-3``, ... should it be taken."""
    candidate, count = id, 1
    while candidate in seen:
        count += 1
        candidate = f"{id}-{count}"
    return candidate
