"""UniEdit: facts of 25 domains, with questions that follow from them or do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kecore.api.types import EditRecord, Probe, ProbeKind
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Published
from kecore.evaluate.probes import edit_probe, make_request
from kecore_datasets.shared import known

__all__ = ["UNIEDIT"]

_PARTS = ("edit", "generality", "locality")


def _is_record(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(part), Mapping) for part in _PARTS)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType] - of JSON


def _is_uniedit(values: Mapping[str, Any]) -> bool:
    """Return whether an object is a domain's file: a record under each name."""
    return bool(values) and all(map(_is_record, values.values()))


def _records(document: Fields) -> list[dict[str, Any]]:
    """Make an object of each record, with its name."""
    records: list[dict[str, Any]] = []
    for name in document.values:
        records.append({**document.object(name).values, "id": name})
    return records


def _questions(fields: Fields, kind: ProbeKind) -> list[Probe]:
    """Make probes of questions over one chain of facts (``single``) or two that meet (``double``), by that."""
    group = fields.object("generality" if kind == "portability" else "locality")
    probes: list[Probe] = []
    for name in group.values:
        question = group.object(name)
        axis = question.text_or_none("path_type") or "single"
        probes.append(question.probe(kind, "prompt", "target", axis))
    return probes


def _uniedit(fields: Fields) -> EditRecord:
    """Read a record of UniEdit (arXiv 2505.12345); the criteria that its code names are no fields and are not read."""
    edit = fields.object("edit")
    subject, target = edit.text("subject"), edit.text("target")
    request = make_request(edit, edit.text("prompt"), subject, target, None, fields.id("id"))
    probes = [edit_probe(request), *_questions(fields, "locality"), *_questions(fields, "portability")]
    relation = edit.object("property").text_or_none("id") if "property" in edit else None
    return EditRecord(request, tuple(probes), labels=known(relation=relation))


UNIEDIT = Layout(
    "uniedit",
    (),
    "{NAME: {edit{prompt, subject, target}, generality{...}, locality{...}}}",
    _uniedit,
    ("relation", *(f"{kind}: {path}" for kind in ("portability", "locality") for path in ("single", "double"))),
    (
        Published(
            "UniEdit", "facts of 25 domains of Wikidata, with questions over chains of facts", "311,000", "MIT",
            "hf:qizhou/UniEdit", "2505.12345",
        ),
    ),
    detect=_is_uniedit,
    expand=_records,
)  # fmt: skip
