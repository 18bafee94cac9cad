"""Records written by hand, in the fields of kecore's own layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from kecore.api.types import EditRecord, EditRequest
from kecore.evaluate import record_to_json
from kecore.evaluate.fields import Fields
from kecore.evaluate.own_layout import read_record


def ask(prompt: str, *answers: str, **more: Any) -> dict[str, Any]:
    """A probe of the layout: its prompt and answers, and further fields such as ``conditions``."""
    values = {"prompt": prompt, "answers": list(answers), **json.loads(json.dumps(more))}
    return {name: value for name, value in values.items() if value}


def make_record(
    request: EditRequest, rephrases: Sequence[str] = (), neighbourhood: Sequence[str] = (), **fields: Any
) -> EditRecord:
    """A record of a request, as the layout reads it."""
    values = {**request.to_json(), "rephrases": rephrases, "neighbourhood": neighbourhood, **fields}
    return read_record(Fields(json.loads(json.dumps(values)), "a record"))


def axes(record: EditRecord, kind: str) -> dict[str, tuple[dict[str, Any], ...]]:
    """Probes of locality or portability by axis, as :func:`ask` makes them."""
    return {axis: tuple(probes) for axis, probes in record_to_json(record).get(kind, {}).items()}


def aliases(record: EditRecord) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Further spellings of the target, and of the old answer."""
    (edit,) = record.probes_of("edit")
    return edit.answers[1:], edit.rivals[1:]


def chains(record: EditRecord) -> list[dict[str, Any]]:
    """Questions over several hops, as the layout has them."""
    return record_to_json(record).get("multi_hop", [])
