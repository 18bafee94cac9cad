"""Triples of subject, relation and object, as knowledge graphs hold them, made into edits by relation templates."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    "read_labels",
    "read_templates",
    "read_triples",
    "write_records",
]

_SUBJECT = ("subject", "head", "head_entity", "h", "s")
_RELATION = ("relation", "predicate", "rel", "r", "p")
_OBJECT = ("object", "tail", "tail_entity", "t", "o")
_ROLES = (_SUBJECT, _RELATION, _OBJECT)
_HOLDERS = ("triples", "relation", "relations", "kg", "spo_list")
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
    """What became of a set of triples.

    Args:
        records: edits, one for each subject and relation, in order.
        unknown: relations that no template was found for, with the number of their triples, the most frequent first.
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
    triples = [triple for document in open_source(source, None) for triple in _triples(document)]
    if not triples:
        raise DataFormatError(f"{source} holds no triples; expected subject, relation and object on each line")
    return triples


def _triples(document: Document) -> Iterator[Triple]:
    text = document.text or ""
    if text.lstrip()[:1] in ("[", "{"):
        for where, value in document.objects():
            yield from _of_value(value, where)
        return
    if document.name.removesuffix(".gz").casefold().endswith(".csv"):
        for where, value in document.objects():
            yield _of_object(Fields(value, where))
        return
    order = [0, 1, 2]
    for i, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        where = f"{document.name} line {i}"
        named = [_role(cell) for cell in cells]
        if i == 1 and all(role in named for role in range(3)):
            order = [named.index(role) for role in range(3)]
            continue
        if len(cells) <= max(order):
            raise DataFormatError(f"{where}: expected subject, relation and object between tabs, got {line!r:.80}")
        yield Triple._make([*(cells[column] for column in order), where])


def _role(name: str) -> int | None:
    return next((i for i, names in enumerate(_ROLES) if name.casefold() in names), None)


def _of_value(value: Any, where: str) -> Iterator[Triple]:
    if isinstance(value, list):
        parts = cast("list[Any]", value)
        if len(parts) == 3 and all(isinstance(part, str) for part in parts):
            yield Triple._make([*(part.strip() for part in parts), where])
            return
        raise DataFormatError(f"{where}: expected a list of three texts, got {value!r:.80}")
    fields = Fields(value, where)
    if "samples" in fields and "name" in fields:
        for item in fields.objects("samples"):
            subject, object_ = (item.text(name).strip() for name in ("subject", "object"))
            yield Triple(subject, fields.text("name"), object_, item.where)
        return
    holder = next((name for name in _HOLDERS if isinstance(fields.values.get(name), list)), None)
    if holder is None:
        yield _of_object(fields)
        return
    for i, item in enumerate(fields.values[holder]):
        yield from _of_value(item, f"{where}, '{holder}'[{i}]")


def _of_object(fields: Fields) -> Triple:
    names = [next((key for key in fields.values if key.casefold() in role), role[0]) for role in _ROLES]
    return Triple._make([*(fields.text(name).strip() for name in names), fields.where])


def read_labels(files: Iterable[str | Path]) -> dict[str, str]:
    """Texts of ids, from files of two columns between tabs, as OpenBG has them for its entities and relations.

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
    for i, line in enumerate((document.text or "").splitlines(), 1):
        if line.strip():
            cells = [cell.strip() for cell in line.split("\t")]
            if len(cells) < 2 or not all(cells[:2]):
                raise DataFormatError(f"{document.name} line {i}: expected two texts between tabs, got {line!r:.80}")
            yield f"{document.name} line {i}", cells


def read_templates(files: Iterable[str | Path] = ()) -> dict[str, tuple[str, ...]]:
    """Prompts of relations: kecore's own (85 relations), and those of the user's files, which come first.

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
    if text.lstrip()[:1] not in ("[", "{"):
        for where, (relation, template, *_) in _lines(document):
            yield _key(relation), _checked([template], where)
        return
    for where, value in document.objects():
        fields = Fields(value, where)
        if not any(name in fields for name in _TEMPLATES):
            for relation in fields.values:
                yield _key(relation), _checked(fields.texts(relation), f"{where}, '{relation}'")
            continue
        templates = _checked([text for name in _TEMPLATES for text in fields.texts(name)], where)
        for relation in [text for name in _NAMES for text in fields.texts(name)]:
            yield _key(relation), templates


def _checked(templates: Sequence[str], where: str) -> tuple[str, ...]:
    for template in templates:
        if template.count(SLOT) != 1:
            raise DataFormatError(f"{where}: expected one '{{}}' for the subject in the template {template!r}")
    if not templates:
        raise DataFormatError(f"{where}: expected at least one template")
    return tuple(dict.fromkeys(templates))


def _key(relation: str) -> str:
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
    objects: dict[tuple[str, str], Triple] = {}
    for triple in triples:
        subject, relation, object_ = (texts.get(part, part) for part in triple[:3])
        wordings = templates.get(_key(triple.relation)) or templates.get(_key(relation))
        if not wordings:
            unknown[relation] += 1
            continue
        if earlier := objects.get((subject, _key(relation))):
            same = texts.get(earlier.object, earlier.object) == object_
            reason = "repeats" if same else f"gives {object_!r} where {earlier.object!r} stands in"
            skipped.append(Skipped(triple.where, f"{triple.where}: {reason} {earlier.where}"))
            continue
        try:
            record = _record(triple.where, wordings, subject, relation, object_)
        except DataFormatError as error:
            skipped.append(Skipped(triple.where, str(error)))
            continue
        objects[subject, _key(relation)] = triple
        records.append(record)
    return Imported(tuple(records), dict(unknown.most_common()), tuple(skipped))


def _record(where: str, wordings: Sequence[str], subject: str, relation: str, target: str) -> EditRecord:
    request = make_request(Fields({}, where), wordings[0], subject, target)
    edit = edit_probe(request)
    rephrases = paraphrases(edit, [wording.replace(SLOT, request.subject) for wording in wordings[1:]])
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
