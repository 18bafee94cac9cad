"""Triples of subject, relation and object, as knowledge graphs hold them, made into edits by relation templates."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

from kecore import data
from kecore.api.errors import DataFormatError
from kecore.api.types import SLOT, EditRecord
from kecore.evaluate.fields import Fields
from kecore.evaluate.own_layout import record_to_json
from kecore.evaluate.probes import edit_probe, make_request, paraphrases
from kecore.evaluate.records import Skipped
from kecore.evaluate.sources import Document, open_source

__all__ = [
    "Imported",
    "Triple",
    "import_triples",
    "nearest_relation",
    "read_labels",
    "read_templates",
    "read_triples",
    "write_records",
]

_SUBJECT = ("subject", "head", "head_entity", "h", "s")
_RELATION = ("relation", "predicate", "rel", "r", "p")
_OBJECT = ("object", "tail", "tail_entity", "t", "o")
_ROLES = (_SUBJECT, _RELATION, _OBJECT)
_TRIPLE_LISTS = ("triples", "relation", "relations", "kg", "spo_list")  # fields that hold the triples of an object
_NAMES, _TEMPLATES = ("names", "name"), ("templates", "prompt_templates", "prompt_templates_zs")


class Triple(NamedTuple):
    """One fact of a knowledge graph.

    Args:
        subject: what it is about.
        relation: its name or id.
        object: what is said of the subject.
        where: its place in the file.
    """

    subject: str
    relation: str
    object: str
    where: str


@dataclass(frozen=True)
class Imported:
    """Edits that were made of triples, and the triples that make none.

    Args:
        records: edits, one for each subject and relation, in order.
        unknown: relations without a template, with the number of their triples, the most frequent first.
        skipped: triples that make no edit for another reason: repeated, contradicting an earlier one, or incomplete.
    """

    records: tuple[EditRecord, ...]
    unknown: Mapping[str, int]
    skipped: tuple[Skipped, ...]


def read_triples(source: str | Path) -> list[Triple]:
    """Read triples from a file or a folder of files, plain or gzipped.

    TSV: three columns a line, in the order subject, relation, object, or in any order under a header that names them.
    JSON, JSONL and CSV: objects that name the three (``subject``/``head``/``h``, ``relation``/``predicate``/``r``,
    ``object``/``tail``/``t``); arrays of three; objects that hold such under ``triples``, ``relation`` or ``kg``; and
    lists of ``samples`` of the one relation that the object's ``name`` says.

    Raises:
        DataFormatError: nothing of that kind is found; names the place.
    """
    triples = list(chain.from_iterable(_triples(document) for document in open_source(source, None)))
    if not triples:
        raise DataFormatError(f"{source} holds no triples; expected subject, relation and object on each line")
    return triples


def _is_json(text: str) -> bool:
    return text.lstrip().startswith(("[", "{"))


def _triples(document: Document) -> Iterator[Triple]:
    """Yield the triples of a file, which is JSON, CSV or TSV."""
    text = document.text or ""
    if _is_json(text):
        for where, value in document.objects():
            yield from _triples_of_value(value, where)
    elif document.name.removesuffix(".gz").casefold().endswith(".csv"):
        for where, value in document.objects():
            yield _triple_of_object(Fields(value, where))
    else:
        yield from _triples_of_lines(document.name, text)


def _triples_of_lines(name: str, text: str) -> Iterator[Triple]:
    columns = [0, 1, 2]  # of subject, relation and object
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        where = f"{name} line {number}"
        if number == 1:
            header = _header_columns(cells)
            if header is not None:
                columns = header
                continue
        if len(cells) <= max(columns):
            raise DataFormatError(f"{where}: expected subject, relation and object between tabs, got {line!r:.80}")
        subject, relation, object_ = [cells[column] for column in columns]
        yield Triple(subject, relation, object_, where)


def _header_columns(cells: Sequence[str]) -> list[int] | None:
    """Return the columns of subject, relation and object by a header's cells; None if these are no header."""
    columns: list[int] = []
    for names in _ROLES:
        matching = [column for column, cell in enumerate(cells) if cell.casefold() in names]
        if not matching:
            return None
        columns.append(matching[0])
    return columns


def _triples_of_value(value: Any, where: str) -> Iterator[Triple]:
    """Yield the triples of a JSON value: a list of three texts, or one of the objects of :func:`read_triples`."""
    if isinstance(value, list):
        texts = cast("list[Any]", value)
        if len(texts) != 3 or not all(isinstance(text, str) for text in texts):
            raise DataFormatError(f"{where}: expected a list of three texts, got {value!r:.80}")
        subject, relation, object_ = [text.strip() for text in texts]
        yield Triple(subject, relation, object_, where)
        return
    fields = Fields(value, where)
    if "samples" in fields and "name" in fields:
        for item in fields.objects("samples"):
            yield Triple(item.text("subject").strip(), fields.text("name"), item.text("object").strip(), item.where)
        return
    for name in _TRIPLE_LISTS:
        if isinstance(fields.values.get(name), list):
            for i, item in enumerate(fields.values[name]):
                yield from _triples_of_value(item, f"{where}, '{name}'[{i}]")
            return
    yield _triple_of_object(fields)


def _triple_of_object(fields: Fields) -> Triple:
    texts: list[str] = []
    for names in _ROLES:
        matching = [key for key in fields.values if key.casefold() in names]
        name = matching[0] if matching else names[0]  # where none matches, the error names the usual field
        texts.append(fields.text(name).strip())
    subject, relation, object_ = texts
    return Triple(subject, relation, object_, fields.where)


def read_labels(files: Iterable[str | Path]) -> dict[str, str]:
    """Read texts of ids from files of two columns between tabs, as OpenBG has them for its entities and relations.

    Raises:
        DataFormatError: a line has fewer columns; names it.
    """
    labels: dict[str, str] = {}
    for file in files:
        (document,) = open_source(file, None)
        for _, cells in _lines(document):
            labels[cells[0]] = cells[1]
    return labels


def _lines(document: Document) -> Iterator[tuple[str, list[str]]]:
    """Yield the place and the cells of each line that is not blank."""
    for i, line in enumerate((document.text or "").splitlines(), 1):
        if line.strip():
            cells = [cell.strip() for cell in line.split("\t")]
            if len(cells) < 2 or not all(cells[:2]):
                raise DataFormatError(f"{document.name} line {i}: expected two texts between tabs, got {line!r:.80}")
            yield f"{document.name} line {i}", cells


def read_templates(files: Iterable[str | Path] = ()) -> dict[str, tuple[str, ...]]:
    """Read prompts of relations: kecore's own (85 relations), and those of the user's files, which take precedence.

    A file is a JSON object of relation to template or templates; a JSON list of objects with ``names`` and
    ``templates`` (or ``name`` and ``prompt_templates``, as github.com/evandez/relations has it); or two columns
    between tabs. The first template of a relation becomes the prompt, the others its rephrases.

    Returns:
        Templates with one ``{}`` for the subject, by the relation's name in small letters without ``_``.

    Raises:
        DataFormatError: a template has not exactly one ``{}``; names it.
    """
    templates: dict[str, tuple[str, ...]] = {}
    for source in [data.path("relation_templates.json"), *files]:
        for document in open_source(source, None):
            templates |= dict(_templates(document))
    return templates


def _templates(document: Document) -> Iterator[tuple[str, tuple[str, ...]]]:
    text = document.text or ""
    if not _is_json(text):
        for where, (relation, template, *_) in _lines(document):
            yield _key(relation), _check_templates([template], where)
        return
    for where, value in document.objects():
        fields = Fields(value, where)
        if not any(name in fields for name in _TEMPLATES):
            for relation in fields.values:
                yield _key(relation), _check_templates(fields.texts(relation), f"{where}, '{relation}'")
            continue
        templates = _check_templates(list(chain.from_iterable(map(fields.texts, _TEMPLATES))), where)
        for relation in chain.from_iterable(map(fields.texts, _NAMES)):
            yield _key(relation), templates


def _check_templates(templates: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the templates of a relation, each once.

    Raises:
        DataFormatError: there is none, or one has not exactly one ``{}``.
    """
    for template in templates:
        if template.count(SLOT) != 1:
            raise DataFormatError(f"{where}: expected one '{{}}' for the subject in the template {template!r}")
    if not templates:
        raise DataFormatError(f"{where}: expected at least one template")
    return tuple(dict.fromkeys(templates))


def nearest_relation(relation: str, known: Iterable[str]) -> str:
    """Return the known relation that a name is most like, or that holds all of its words; empty where none is."""
    key = _key(relation)
    for name in known:
        if set(key.split()) <= set(name.split()):
            return name
    return next(iter(difflib.get_close_matches(key, list(known), n=1)), "")


def _key(relation: str) -> str:
    """Return a relation's name as templates are looked up by it: in small letters, without ``_``."""
    return " ".join(relation.casefold().replace("_", " ").split())


def import_triples(
    triples: Iterable[Triple],
    templates: Mapping[str, Sequence[str]] | None = None,
    labels: Mapping[str, str] | None = None,
) -> Imported:
    """Make edits of triples.

    A subject and a relation make one edit: a triple that repeats an earlier one, or gives another object, is listed
    instead, since no model can continue one prompt with two answers.

    Args:
        triples: in the order that decides which of two contradicting ones counts.
        templates: by default kecore's own, from :func:`read_templates`.
        labels: texts of the ids that stand in the triples, if ids do.

    Examples:
        >>> imported = import_triples([Triple("Ann", "native_language", "French", "line 1")])
        >>> imported.records[0].request.text, imported.records[0].request.target
        ('The mother tongue of Ann is', 'French')
    """
    templates = read_templates() if templates is None else templates
    texts = labels or {}
    records: list[EditRecord] = []
    skipped: list[Skipped] = []
    unknown: Counter[str] = Counter()
    edited: dict[tuple[str, str], Triple] = {}  # the triple behind each edit, by subject and relation
    for triple in triples:
        subject = texts.get(triple.subject, triple.subject)
        relation = texts.get(triple.relation, triple.relation)
        object_ = texts.get(triple.object, triple.object)
        wordings = templates.get(_key(triple.relation)) or templates.get(_key(relation))
        if not wordings:
            unknown[relation] += 1
            continue
        earlier = edited.get((subject, _key(relation)))
        if earlier is not None:
            same = texts.get(earlier.object, earlier.object) == object_
            reason = "repeats" if same else f"gives {object_!r} where {earlier.object!r} stands in"
            skipped.append(Skipped(triple.where, f"{triple.where}: {reason} {earlier.where}"))
            continue
        try:
            record = _record(triple.where, wordings, subject, relation, object_)
        except DataFormatError as error:
            skipped.append(Skipped(triple.where, str(error)))
            continue
        edited[subject, _key(relation)] = triple
        records.append(record)
    return Imported(tuple(records), dict(unknown.most_common()), tuple(skipped))


def _record(where: str, wordings: Sequence[str], subject: str, relation: str, target: str) -> EditRecord:
    request = make_request(Fields({}, where), wordings[0], subject, target)
    edit = edit_probe(request)
    rephrases = paraphrases(edit, [wording.replace(SLOT, subject.strip()) for wording in wordings[1:]])
    return EditRecord(request, (edit, *rephrases), source=f"triple: {where}", labels={"relation": relation})


def write_records(path: Path, records: Iterable[EditRecord]) -> Path:
    """Write records as JSONL in kecore's own layout, whole or not at all.

    Raises:
        StorageError: the system refuses.
    """
    from kecore.files import write_atomic  # with torch

    text = "".join(json.dumps(record_to_json(record), ensure_ascii=False) + "\n" for record in records)

    def write(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    return write_atomic(path, write)
