"""Reference texts for consistency: Wikipedia passages about other subjects that have the new target."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kecore.api.errors import DataFormatError
from kecore.api.types import EditRecord
from kecore.evaluate.fields import Fields
from kecore.evaluate.probes import openings
from kecore.evaluate.sources import open_source

__all__ = ["with_references"]


def with_references(records: Sequence[EditRecord], snippets: str | Path) -> list[EditRecord]:
    """Return records with the reference texts of their relation and new target.

    The file is CounterFact's ``attribute_snippets.json`` (github.com/kmeng01/rome): a list of objects with
    ``relation_id``, ``target_id`` and ``samples``, whose ``text`` is the passage. It is published as one array of
    0.9 GB: it is read as text and taken apart object by object, so that only what belongs to a record is kept.

    Args:
        records: those without the labels ``relation`` and ``target_id``, and those that nothing is found for, stay as
            they are.
        snippets: the file, plain or gzipped.

    Raises:
        DataFormatError: it is not such a file; names the place.
    """
    keys = {_key(record) for record in records if all(_key(record))}
    passages: dict[_Key, list[str]] = defaultdict(list)
    (document,) = open_source(snippets, None)
    for number, value in enumerate(_elements(document.text or "", document.name), 1):
        item = Fields(value, f"{document.name} record {number}")
        key = _Key(item.text("relation_id"), item.text("target_id"))
        if key in keys:
            passages[key] += [sample.text("text") for sample in item.objects("samples")]
    completed: list[EditRecord] = []
    for record in records:
        texts = passages.get(_key(record))
        completed.append(record if texts is None else _with_texts(record, texts))
    return completed


class _Key(NamedTuple):
    """Relation and target that passages are about; the fields of a record without such labels are empty."""

    relation: str
    target: str


def _key(record: EditRecord) -> _Key:
    return _Key(record.labels.get("relation", ""), record.labels.get("target_id", ""))


def _with_texts(record: EditRecord, texts: Sequence[str]) -> EditRecord:
    prompts = record.prompts_of("generation") or (record.request.text,)
    return record.with_probes("generation", openings(prompts, texts))


_SPACE = re.compile(r"[ \t\r\n]*")


def _elements(text: str, name: str) -> Iterator[Any]:
    """Yield the elements of a JSON array, one at a time."""
    decoder = json.JSONDecoder()
    position = _skip_space(text, 0)
    if not text.startswith("[", position):
        raise DataFormatError(f"{name}: expected a JSON array of snippets")
    position = _skip_space(text, position + 1)
    while not text.startswith("]", position):
        try:
            value, position = decoder.raw_decode(text, position)
        except ValueError as error:
            raise DataFormatError(f"{name}: not JSON ({error}); copy the file again") from None
        yield value
        position = _skip_space(text, position)
        if text.startswith(",", position):
            position = _skip_space(text, position + 1)


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position
