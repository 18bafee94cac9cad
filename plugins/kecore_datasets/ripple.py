"""RippleEdits: what should follow from an edit, and what should not, each under conditions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from itertools import chain

from kecore.api.errors import DataFormatError
from kecore.api.types import BackgroundKind, EditRecord, NamesAll, Probe, ProbeKind
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Published
from kecore.evaluate.probes import edit_probe, make_request, make_test
from kecore_datasets.shared import known

__all__ = ["RIPPLEEDITS"]

_FOLLOWS = ("Logical_Generalization", "Compositionality_I", "Compositionality_II", "Subject_Aliasing")
_STAYS = {"Relation_Specificity": ("Relation_Specificity", "Relation_Specifity"), "Forgetfulness": ("Forgetfulness",)}


@cache
def _templates() -> Mapping[str, str]:
    """Read the wording of each relation, as the benchmark writes it (edenbiran/RippleEdits, MIT)."""
    return json.loads((files("kecore_datasets") / "ripple_relations.json").read_text(encoding="utf-8"))


def _fact(fields: Fields) -> tuple[str, str, str]:
    """Return prompt, subject and object of a statement such as ``The mother tongue of Ann is French``."""
    relation, statement = fields.text("relation"), fields.text("prompt").strip()
    template = _templates().get(relation)
    if template is None:
        raise DataFormatError(f"{fields.where}: the relation {relation!r} is not one of RippleEdits")
    before, _, after = template.partition("{}")
    match = re.fullmatch(f"{re.escape(before)}(.+?){re.escape(after)} (.+?)\\.?", statement, flags=re.DOTALL)
    if match is None:
        raise DataFormatError(f"{fields.where}: expected a statement of the form '{template} ...', got {statement!r}")
    return template, match[1], match[2]


def _query(fields: Fields, kind: ProbeKind | BackgroundKind) -> Probe:
    """Make the probe of a query, whose answer must hold a name of each thing that it asks for.

    As in the official code, a name of one character counts only if it is a digit.
    """
    prompt = fields.text("prompt").strip()
    things: list[tuple[str, ...]] = []
    for item in fields.objects("answers"):
        names = item.answers("value") + item.answers_or_none("aliases")
        things.append(tuple(name for name in names if len(name) > 1 or name.isdigit()))
    # A thing without a name that counts can never be named: without answers the probe is reported as not scored.
    if not things or not all(things):
        return Probe(kind, prompt)
    first, *further = things
    probe = Probe(kind, prompt, first)
    if not further:
        return probe
    return replace(probe, rule=NamesAll(tuple(further)))


def _test(fields: Fields, kind: ProbeKind, axis: str, number: int) -> tuple[Probe, ...]:
    """Make the probes of a test, which is passed where any (``OR``) or all (``AND``) of its queries are answered.

    It counts only where its conditions hold.
    """
    joined = fields.text("test_condition")
    if joined not in ("OR", "AND"):
        raise fields.fail("test_condition", "'OR' or 'AND'")
    conditions = tuple(_query(query, "condition") for query in fields.objects("condition_queries"))
    queries = [_query(query, kind) for query in fields.objects("test_queries")]
    need = "all" if joined == "AND" and len(queries) > 1 else "any"
    return make_test([replace(query, axis=axis, need=need, conditions=conditions) for query in queries], number)


def _tests(fields: Fields, kind: ProbeKind, axis: str, names: tuple[str, ...]) -> list[Probe]:
    """Make the probes of an axis, which has several names in older publications."""
    items = list(chain.from_iterable(fields.objects_or_none(name) for name in names))
    with_queries = [item for item in items if item.objects("test_queries")]
    probes: list[Probe] = []
    for number, item in enumerate(with_queries):
        probes += _test(item, kind, axis, number)
    return probes


def _ripple(fields: Fields) -> EditRecord:
    """Read a record of RippleEdits (arXiv 2307.12976).

    Edits are published as statements; the wording of their relation tells subject and object. A test counts
    where the model answers all its condition queries before the edit; a query whose answer is several things
    asks for all of them.
    """
    edit = fields.object("edit")
    prompt, subject, target = _fact(edit)
    truth = None
    for name in ("previous_fact", "original_fact"):  # older publications of the benchmark have the second name
        if name in edit:
            _, _, truth = _fact(edit.object(name))
            break
    request = make_request(edit, prompt, subject, target, truth)
    probes = [edit_probe(request)]
    for axis, names in _STAYS.items():
        probes += _tests(fields, "locality", axis, names)
    for axis in _FOLLOWS:
        probes += _tests(fields, "portability", axis, (axis,))
    labels = known(relation=edit.text("relation"), category=fields.text_or_none("example_type"))
    return EditRecord(request, tuple(probes), labels=labels)


RIPPLEEDITS = Layout(
    "rippleedits",
    ("edit", "Logical_Generalization", "Subject_Aliasing"),
    "edit{prompt, relation, ...}, Logical_Generalization[{test_queries, test_condition, condition_queries}], ...",
    _ripple,
    (
        "relation", "category", *(f"portability: {axis}" for axis in _FOLLOWS),
        *(f"locality: {axis}" for axis in _STAYS), "conditions of probes",
    ),
    (
        Published(
            "RippleEdits", "recent, random and popular facts with six kinds of consequences", "about 5,000", "MIT",
            "github.com/edenbiran/RippleEdits", "2307.12976",
        ),
    ),
)  # fmt: skip
