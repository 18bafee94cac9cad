"""The facts of a session: read from a form, a text or a file, with what was understood of them."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from kecore.api.errors import DataFormatError
from kecore.api.types import EditRecord
from kecore.evaluate import load_records
from kecore.evaluate.records import RecordSet
from kecore_analysis.doubts import find_doubts
from kecore_analysis.facts import count_notes

__all__ = ["MOST_FACTS", "FactSheet", "guess_name", "read_facts", "read_form"]

MOST_FACTS = 2000
"""Facts of a file that the studio takes; more than anybody looks at in a page. ``kecore edit`` takes any number."""

_SHOWN = 200


@dataclass(frozen=True, slots=True)
class FactSheet:
    """Facts, and how they were read.

    Args:
        name: what they were called: a file's name, or empty for typed ones.
        records: the facts with their probes.
        reading: how they were read, as JSON values.
        warnings: what the reader remarked.
    """

    name: str
    records: RecordSet
    reading: Mapping[str, Any]
    warnings: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Return the table of what was understood, as JSON values; of many facts the first ones."""
        facts = [_fact_to_json(number, record) for number, record in enumerate(self.records[:_SHOWN])]
        return {
            "name": self.name,
            "count": len(self.records),
            "facts": facts,
            "reading": dict(self.reading),
            "warnings": list(self.warnings),
        }


def read_form(fields: Mapping[str, Any]) -> FactSheet:
    """Read one fact from the fields of a form.

    Args:
        fields: ``prompt``, ``subject``, ``target``, and where they are known ``ground_truth``, ``paraphrases`` and
            ``neighbours`` (prompts, one a line).

    Raises:
        DataFormatError: a field is missing or contradicts another one.
    """
    fact: dict[str, Any] = {}
    for name in ("prompt", "subject", "target", "ground_truth"):
        text = str(fields.get(name) or "").strip()
        if text:
            fact[name] = text
    lists = {"rephrases": "paraphrases", "neighbourhood": "neighbours"}
    for field, name in lists.items():
        lines = [line.strip() for line in str(fields.get(name) or "").splitlines() if line.strip()]
        if lines:
            fact[field] = lines
    return read_facts(json.dumps([fact]).encode(), "form.json", shown_name="")


def read_facts(content: bytes, name: str, *, shown_name: str | None = None) -> FactSheet:
    """Read facts from the content of a file, in any layout that is installed or as somebody wrote them down.

    Args:
        content: the bytes.
        name: the file's name, whose ending says what it is.
        shown_name: what the facts are called; by default that name.

    Raises:
        DataFormatError: they cannot be read; names line or record and field.
    """
    file_name = PurePath(name.replace("\\", "/")).name or "facts.json"
    with tempfile.TemporaryDirectory(prefix="kecore-studio-") as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = Path(folder) / file_name
        path.write_bytes(content)
        records = load_records(path, limit=MOST_FACTS + 1)
    if len(records) > MOST_FACTS:
        raise DataFormatError(
            f"{file_name} holds more than {MOST_FACTS} facts, which is more than a page can show; edit them with "
            "`kecore edit MODEL --facts FILE`, and open the edit here"
        )
    doubts = find_doubts(records.records)
    reading = {
        "layout": records.format,
        "origins": dict(records.origins),
        "notes": count_notes(records.records),
        "skipped": [{"where": item.where, "reason": item.reason} for item in records.skipped],
        "doubts": [
            {"kind": doubt.kind, "count": len(doubt.ids), "example": doubt.example, "stops": doubt.stops}
            for doubt in doubts
        ],
    }
    remarks = list(dict.fromkeys(str(item.message) for item in caught))
    return FactSheet(file_name if shown_name is None else shown_name, records, reading, remarks)


def guess_name(text: str) -> str:
    """Return a file name for typed facts whose ending says what they look like."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    first = lines[0].strip() if lines else ""
    if first.startswith("["):
        return "typed.json"
    if first.startswith("{"):
        is_whole = len(lines) == 1 or not lines[0].strip().endswith("}")
        return "typed.json" if is_whole else "typed.jsonl"
    if "\t" in first:
        return "typed.tsv"
    if first.startswith("- ") or (": " in first and "," not in first):
        return "typed.yaml"
    return "typed.csv"


def _fact_to_json(number: int, record: EditRecord) -> dict[str, Any]:
    request = record.request
    return {
        "number": number,
        "id": request.id,
        "prompt": request.text,
        "subject": request.subject,
        "target": request.target,
        "ground_truth": request.ground_truth,
        "paraphrases": len(record.probes_of("paraphrase")),
        "neighbours": len(record.probes_of("neighbourhood")),
        "probes": len([probe for probe in record.probes if probe.kind != "edit"]),
    }
