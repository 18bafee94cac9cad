"""Loading facts: published benchmarks and kecore's own layout, from a file, a folder or the Hugging Face hub."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256 as digest_of
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, overload

from kecore.api.errors import ConfigError, DataFormatError, KecoreError, KecoreWarning
from kecore.api.show import html_table
from kecore.api.types import EditRecord, EditRequest
from kecore.evaluate.containers import objects_of
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Part, default, layout_of, sniff
from kecore.evaluate.mapping import FieldMap, read_map
from kecore.evaluate.own_layout import record_to_json
from kecore.evaluate.sources import Document, open_source
from kecore.evaluate.unknown import explain_unknown
from kecore.hub import is_reference

__all__ = ["RecordSet", "Skipped", "load_records"]

_OWN = "kecore"
"""The layout of files whose fields were named by hand."""
_SAMPLE = 5
"""Objects looked at to recognise a layout: more than one, so that a bad first line gets its own error."""
_SHORTEST_DIGEST = 12  # hex digits of an expected checksum


class Skipped(NamedTuple):
    """A record that could not be represented, or a file of a folder that holds none, and why."""

    where: str
    reason: str


@dataclass(frozen=True, repr=False)
class RecordSet(Sequence[EditRecord]):
    """The records of one source, with what is needed to say which source that was.

    Args:
        records: in file order.
        skipped: what is not among them.
        format: name of the recognised layout.
        path: the file or folder; for the hub its reference, ``hf:...``.
        sha256: digest of the file's bytes as stored (of the ``.gz`` where it is one); of a folder, of the
            names and digests of its files; of a hub data set, of its rows as JSON.
        renamed: records whose published id stood on an earlier record, and what they are called here.
        variant: how the records are edited, where the layout has several ways; else empty.
        split: the split that was asked for, else empty.
        origins: field of kecore's own layout to the fields of the file that it was read from, where these go by many
            names.
    """

    records: tuple[EditRecord, ...]
    skipped: tuple[Skipped, ...]
    format: str
    path: Path
    sha256: str
    renamed: tuple[Skipped, ...] = ()
    variant: str = ""
    split: str = ""
    origins: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<RecordSet of {len(self)} records from {self.path}, layout '{self.format}'>"

    def _repr_html_(self) -> str:
        rows: list[tuple[str, ...]] = []
        for request in self.requests:
            rows.append((request.text, request.subject or "", request.target, request.ground_truth or ""))
        return html_table(repr(self)[1:-1], ("prompt", "subject", "target", "instead of"), rows)

    @property
    def requests(self) -> list[EditRequest]:
        """The edits, without their probes; of records with joint edits, all of them."""
        return list(chain.from_iterable(record.requests for record in self.records))

    @property
    def content_sha256(self) -> str:
        """Digest of the records themselves: equal for equal records, however they were stored and compressed."""
        h = digest_of()
        for record in self.records:
            values = {name: value for name, value in record_to_json(record).items() if name != "source"}
            h.update(json.dumps(values, sort_keys=True, ensure_ascii=False).encode() + b"\n")
        return h.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return where the records come from and how many there are, as JSON values, without the records."""
        return {
            "path": str(self.path),
            "format": self.format,
            "variant": self.variant,
            "split": self.split,
            "sha256": self.sha256,
            "content_sha256": self.content_sha256,
            "records": len(self.records),
            "edits": len(self.requests),
            "skipped": [item._asdict() for item in self.skipped],
            "renamed": [item._asdict() for item in self.renamed],
        }

    @overload
    def __getitem__(self, index: int) -> EditRecord: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[EditRecord, ...]: ...
    def __getitem__(self, index: int | slice) -> EditRecord | tuple[EditRecord, ...]:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)


def load_records(
    source: str | Path,
    *,
    limit: int | None = None,
    format: str | None = None,
    skip_errors: bool | None = None,
    split: str | None = None,
    variant: str | None = None,
    sha256: str | None = None,
    mapping: Mapping[str, str] | FieldMap | None = None,
) -> RecordSet:
    """Read facts in any installed layout (``docs/datasets.md`` lists them), or as somebody wrote them down.

    Args:
        source: a JSON, JSONL, YAML, CSV, TSV, Excel (.xlsx), Parquet or Arrow file, plain or packed by gzip or
            Zstandard; a folder of such files in one layout; or ``hf:OWNER/NAME[@REVISION][:CONFIG]`` and
            ``hf:OWNER/NAME[@REVISION]/path/to/file.json`` on the Hugging Face hub.
        limit: only the first so many records; skipped ones count, so that a limit means the same records for
            everyone.
        format: name of the layout; by default it is recognised by the fields.
        skip_errors: leave out records that cannot be represented and list them in ``skipped`` (with one
            warning), instead of raising. By default so for published data sets, whose few broken records
            no user can mend, and not for kecore's own layout; but a record of another layout is an error then,
            unless ``format`` names the one to read, and so is a source of which more than half cannot be read.
        split: of a folder, a hub data set or a file that holds several: ``train``, ``test``, ``validation``, ``edit``,
            ...; of a spreadsheet, the sheet.
        variant: how the records are edited, for layouts that offer several ways, such as AKEW's.
        mapping: field of kecore's own layout to the file's field that holds it (:class:`FieldMap`), for files whose
            names say something else. By default what ``kecore.toml`` beside the file says, if it names the file.
        sha256: what the digest must be, or its first 12 hex digits or more: of the file as stored or
            unpacked, else as :attr:`RecordSet.sha256` says.

    Raises:
        DataFormatError: the source cannot be read, its layout is unknown, it mixes layouts or splits, its
            digest is another one, no record is usable or less than half of them are, or a record is bad and errors
            are not skipped; names file, line (or record) and field.
        ConfigError: ``limit`` is below 1; there is no such format, split or variant; the mapping names no field of a
            fact, or stands beside ``format``.
        HubError: the hub cannot be reached, or has no such data set.
        MissingDependencyError: the ``datasets`` library is needed and not installed.

    Examples:
        >>> from kecore.data import path
        >>> records = load_records(path("counterfact_sample.jsonl"), limit=2)
        >>> records.format, len(records), len(records[0].probes_of("neighbourhood"))
        ('kecore', 2, 10)
    """
    if limit is not None and (not isinstance(limit, int) or limit < 1):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"limit must be a number of at least 1, got {limit!r}")
    if not str(source or "").strip():
        raise ConfigError("no source of facts was named; give a file, a folder or hf:OWNER/NAME")
    documents = open_source(source, split, stream=True)
    path = Path(source)
    name = str(source) if is_reference(source) else path.name
    digest = _check_digest(documents, sha256, name)
    named_layout = None if format is None else default().get(format)
    field_map = _field_map(path, mapping)
    if field_map is not None and mapping is not None and format is not None:
        raise ConfigError(f"a mapping makes records of kecore's own layout, got format '{format}' beside it; give one")
    if format is not None:
        field_map = None
    elif field_map is not None:
        named_layout = default().get(_OWN)
    layout, objects, unread = _recognise(documents, named_layout, field_map, name)
    parse = layout.parser(variant)
    skip = not layout.strict if skip_errors is None else skip_errors
    mixed = bool(skip_errors) or named_layout is not None
    reading = _Reading(layout, [], list(unread), [], {})
    for where, value in islice(objects, limit):
        reading.add(where, value, parse, skip, mixed)
    if not reading.records:
        reason = reading.skipped[0].reason if reading.skipped else "it holds none"
        raise DataFormatError(f"no record of {name} is usable; the first: {reason}")
    if reading.skipped:
        files = f"{len(unread)} of {len(documents)} files and " if unread else ""
        _warn_of_skipped(reading, name, unread=len(unread), files=files, refuse_most=not skip_errors)
    chosen = variant or next(iter(layout.variants), "")
    records = tuple(layout.finish.get(layout.way(chosen)[0], tuple)(reading.records))
    if not records:
        hint = "; the limit counts those of all variants: raise it" if limit is not None else ""
        raise DataFormatError(
            f"no record of {name} is edited by the variant '{chosen}', of {len(reading.records)} read{hint}"
        )
    return RecordSet(
        records=records,
        skipped=tuple(reading.skipped),
        format=layout.name,
        path=path,
        sha256=digest,
        renamed=tuple(reading.renamed),
        variant=chosen,
        split=split or "",
        origins=reading.origins if field_map is None else {**reading.origins, **field_map.sources},
    )


def _field_map(path: Path, mapping: Mapping[str, str] | FieldMap | None) -> FieldMap | None:
    """Return the given map, or the one that is kept beside a file."""
    if mapping is None:
        return read_map(path) if path.is_file() else None
    return mapping if isinstance(mapping, FieldMap) else FieldMap(mapping)


def _warn_of_skipped(reading: _Reading, name: str, *, unread: int, files: str, refuse_most: bool) -> None:
    """Warn of records that were left out.

    Args:
        reading: the records, and what was left out; the files that were not read come first.
        name: what messages call the source.
        unread: files that were not read.
        files: the same in words.
        refuse_most: raise where more than half of the records cannot be read.

    Raises:
        DataFormatError: more than half of the records cannot be read.
    """
    bad, good = len(reading.skipped) - unread, len(reading.records)
    if bad > good and refuse_most:
        raise DataFormatError(
            f"{bad} of {good + bad} records of {name} cannot be read as the layout '{reading.layout.name}'; "
            f"the first: {reading.skipped[unread].reason}; name another layout by --format, mend the file, "
            "or take what can be read with skip_errors=True"
        )
    warnings.warn(
        f"{files}{bad} of {good + bad} records of {name} cannot be represented and were left out "
        f"(RecordSet.skipped lists them); the first: {reading.skipped[0].reason}",
        KecoreWarning,
        stacklevel=3,
    )


def _check_digest(documents: Sequence[Document], expected: str | None, name: str) -> str:
    """Return the source's digest, held against the expected one."""
    if len(documents) == 1:
        digests = documents[0].digests
    else:
        listing = "".join(f"{document.digests[0]}  {document.name}\n" for document in documents)
        digests = (digest_of(listing.encode()).hexdigest(),)
    if expected is not None:
        wanted = expected.strip().casefold()
        if len(wanted) < _SHORTEST_DIGEST or set(wanted) - set("0123456789abcdef"):
            raise ConfigError(f"sha256 must be at least {_SHORTEST_DIGEST} hex digits, got {expected!r}")
        if not any(digest.startswith(wanted) for digest in digests):
            actual = " or, unpacked, ".join(digests)
            raise DataFormatError(f"{name}: expected SHA-256 {wanted}, got {actual}; it is not the version you named")
    return digests[0]


def _recognise(
    documents: Sequence[Document], named: Layout | None, field_map: FieldMap | None, name: str
) -> tuple[Layout, Iterator[tuple[str, Any]], list[Skipped]]:
    """Find the layout of a source, its records' objects, and the files of a folder that hold none."""
    if len(documents) == 1:
        objects = objects_of(documents[0], named, field_map)
        head = list(islice(objects, _SAMPLE))
        layout = named or _recognise_file([value for _, value in head], name)
        return layout, _expand(layout, chain(head, objects)), []
    parts: dict[str, list[Part]] = {}
    unread: list[Skipped] = []
    layouts: dict[str, Layout] = {}
    for document in documents:
        objects = list(objects_of(document, named, field_map))
        values = [value for _, value in objects[:_SAMPLE]]
        layout = named if named and any(map(named.fits, values)) else sniff(values)
        if layout is None or (named is not None and layout is not named):
            reason = "unknown layout" if layout is None else f"of the layout '{layout.name}'"
            unread.append(Skipped(document.name, f"{document.name}: {reason}"))
            continue
        layouts[layout.name] = layout
        parts.setdefault(layout.name, []).append(Part(document.name, objects))
    if not layouts:
        raise DataFormatError(f"{name}: no file of this folder is of a known layout; the first: {unread[0].reason}")
    if len(layouts) > 1:
        listing: list[str] = []
        for key, files in parts.items():
            listing.append(f"{key}: {', '.join(file.name for file in files)}")
        raise DataFormatError(
            f"{name} mixes layouts ({'; '.join(listing)}); choose one by --format (in Python format=), "
            "or give a single file"
        )
    ((key, layout),) = layouts.items()
    if layout.merge is not None:
        return layout, iter(layout.merge(parts[key])), unread
    return layout, _expand(layout, chain.from_iterable(file.objects for file in parts[key])), unread


def _recognise_file(sample: Sequence[Any], name: str) -> Layout:
    """Find the layout of a file, or raise an error that lists what is known."""
    if not sample:
        raise DataFormatError(f"{name} holds no records")
    layout = sniff(sample)
    if layout is not None:
        return layout
    raise DataFormatError(explain_unknown(sample, name))


def _expand(layout: Layout, places: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    if layout.expand is None:
        yield from places
        return
    for where, document in places:
        for i, value in enumerate(layout.expand(Fields(document, where)), 1):
            yield f"{where} record {i}", value


@dataclass(frozen=True)
class _Reading:
    """The records read so far; ``seen`` is the place of each id, ``origins`` as :class:`RecordSet` has them."""

    layout: Layout
    records: list[EditRecord]
    skipped: list[Skipped]
    renamed: list[Skipped]
    seen: dict[str, str]
    origins: dict[str, str] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)

    def add(self, where: str, value: Any, parse: Any, skip: bool, mixed: bool) -> None:
        """Make a record of one object, or list why there is none; ``mixed`` takes objects of other layouts as bad."""
        other_layout = self._other_layout(value)
        if other_layout is not None and not mixed:
            raise DataFormatError(
                f"{where}: this record is of the layout '{other_layout.name}', the first ones are mostly of "
                f"'{self.layout.name}'; split the file, or name the layout to read by --format (in Python format=)"
            )
        try:
            record: EditRecord = parse(Fields(value, where))
            id = record.request.id
            is_given = id != replace(record.request, id="").id  # a fact that is given twice has one digest
            if id in self.seen and self.layout.strict and is_given:
                raise DataFormatError(f"{where}: field 'id' repeats '{id}' of {self.seen[id]}; ids must differ")
        except DataFormatError as error:
            whose = f" (this record is of the layout '{other_layout.name}')" if other_layout is not None else ""
            if not skip:
                raise DataFormatError(f"{error}{whose}") from None
            self.skipped.append(Skipped(where, f"{error}{whose}"))
            return
        unique = self._unique(id)
        if unique != id:
            self.renamed.append(Skipped(where, f"{where}: id '{id}' stands on {self.seen[id]}; called '{unique}' here"))
            record = record.with_id(unique)
        self.seen[unique] = where
        if self.layout.origins is not None:
            self.origins.update(self.layout.origins(value))
        self.records.append(replace(record, source=record.source or f"{self.layout.name}: {where}"))

    def _other_layout(self, value: object) -> Layout | None:
        """Return the layout of an object that is not of this one; None where it is, or of none."""
        if self.layout.expand is not None or self.layout.merge is not None:  # these take files apart
            return None
        layout = layout_of(value)
        if layout is None or layout is self.layout or self._explains(value):
            return None
        return layout

    def _explains(self, value: object) -> bool:
        """Return whether this layout reads all that an object says, whatever other layout it is of as well."""
        if self.layout.name != _OWN or not self.layout.fits(value):  # of published ones, fields that are left are usual
            return False
        try:
            return not self.layout.parser(None)(Fields(value, "")).notes
        except KecoreError:
            return False

    def _unique(self, id: str) -> str:
        """Return ``id``, or ``id-2``, ``id-3``, ... should it be taken."""
        candidate, count = id, self.repeats.get(id, 1)
        while candidate in self.seen:
            count += 1
            candidate = f"{id}-{count}"
        self.repeats[id] = count  # where to go on, or a file of equal facts would take quadratic time
        return candidate
