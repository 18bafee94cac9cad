"""Reference texts for consistency: Wikipedia passages about other subjects that have the new target."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kecore.api.errors import DataFormatError
from kecore.api.types import EditRecord
from kecore.evaluate.fields import Fields
from kecore.evaluate.probes import openings
from kecore.evaluate.sources import open_source

__all__ = ["with_references"]


def with_references(records: Sequence[EditRecord], snippets: str | Path) -> list[EditRecord]:
    """Records with the reference texts of their relation and new target.

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
    wanted = {_key(record) for record in records if all(_key(record))}
    texts: dict[tuple[str, str], tuple[str, ...]] = {}
    (document,) = open_source(snippets, None)
    for i, value in enumerate(_elements(document.text or "", document.name), 1):
        item = Fields(value, f"{document.name} record {i}")
        key = item.text("relation_id"), item.text("target_id")
        if key in wanted:
            passages = tuple(sample.text("text") for sample in item.objects("samples"))
            texts[key] = texts.get(key, ()) + passages
    return [_with_texts(record, texts[_key(record)]) if _key(record) in texts else record for record in records]


def _key(record: EditRecord) -> tuple[str, str]:
    return record.labels.get("relation", ""), record.labels.get("target_id", "")


def _with_texts(record: EditRecord, texts: Sequence[str]) -> EditRecord:
    prompts = record.prompts_of("generation") or (record.request.text,)
    return record.with_probes("generation", openings(prompts, texts))


def _elements(text: str, name: str) -> Iterator[Any]:
    """The elements of a JSON array, one at a time."""
    decoder, end = json.JSONDecoder(), len(text)

    def skip(place: int) -> int:
        while place < end and text[place] in " \t\r\n":
            place += 1
        return place

    place = skip(0)
    if text[place : place + 1] != "[":
        raise DataFormatError(f"{name}: expected a JSON array of snippets")
    place = skip(place + 1)
    while text[place : place + 1] != "]":
        try:
            value, place = decoder.raw_decode(text, place)
        except ValueError as error:
            raise DataFormatError(f"{name}: not JSON ({error}); copy the file again") from None
        yield value
        place = skip(place)
        if text[place : place + 1] == ",":
            place = skip(place + 1)
