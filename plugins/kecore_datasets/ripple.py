"""RippleEdits: what should follow from an edit, and what should not, each under conditions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Literal

from kecore.api.errors import DataFormatError
from kecore.api.types import EditRecord, Probe
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Published, filled, make_request

__all__ = ["RIPPLEEDITS"]

_FOLLOWS = ("Logical_Generalization", "Compositionality_I", "Compositionality_II", "Subject_Aliasing")
_STAYS = {"Relation_Specificity": ("Relation_Specificity", "Relation_Specifity"), "Forgetfulness": ("Forgetfulness",)}


@cache
def _templates() -> Mapping[str, str]:
    """Wording of each relation, as the benchmark writes it (edenbiran/RippleEdits, MIT); the records name relations."""
    return json.loads((files("kecore_datasets") / "ripple_relations.json").read_text(encoding="utf-8"))


def _fact(fields: Fields) -> tuple[str, str, str]:
    """Prompt, subject and object of a statement such as ``The mother tongue of Ann is French``."""
    relation, statement = fields.text("relation"), fields.text("prompt").strip()
    template = _templates().get(relation)
    if template is None:
        raise DataFormatError(f"{fields.where}: the relation {relation!r} is not one of RippleEdits")
    before, _, after = template.partition("{}")
    found = re.fullmatch(f"{re.escape(before)}(.+?){re.escape(after)} (.+?)\\.?", statement, flags=re.DOTALL)
    if found is None:
        raise DataFormatError(f"{fields.where}: expected a statement of the form '{template} ...', got {statement!r}")
    return template, found[1], found[2]


def _query(fields: Fields) -> tuple[str, list[tuple[str, ...]]]:
    """A query's prompt, and the names of each thing that its answer must hold.

    As in the official code, a name of one character counts only if it is a digit.
    """
    named = [item.answers("value") + item.answers_or_none("aliases") for item in fields.objects("answers")]
    kept = [tuple(name for name in names if len(name) > 1 or name.isdigit()) for names in named]
    return fields.text("prompt").strip(), kept


def _probe(
    fields: Fields,
    conditions: tuple[Probe, ...] = (),
    others: tuple[Probe, ...] = (),
    need: Literal["any", "all"] = "any",
) -> Probe:
    prompt, named = _query(fields)
    # A thing without a name that counts can never be named: without answers the probe is reported as not scored.
    usable = named if all(named) else []
    return Probe(prompt, usable[0] if usable else (), conditions, others, need, tuple(usable[1:]))


def _test(fields: Fields) -> Probe | None:
    """One test: passed where any (``OR``) or all (``AND``) of its queries are answered, if its conditions hold."""
    queries = fields.objects("test_queries")
    if not queries:
        return None
    joined = fields.text("test_condition")
    if joined not in ("OR", "AND"):
        raise fields.fail("test_condition", "'OR' or 'AND'")
    conditions = tuple(_probe(query) for query in fields.objects("condition_queries"))
    others = tuple(_probe(query) for query in queries[1:])
    return _probe(queries[0], conditions, others, "all" if joined == "AND" and others else "any")


def _tests(fields: Fields, *names: str) -> list[Probe]:
    found = [_test(item) for name in names for item in fields.objects_or_none(name)]
    return [test for test in found if test is not None]


def _ripple(fields: Fields) -> EditRecord:
    """RippleEdits (arXiv 2307.12976).

    Edits are published as statements; the wording of their relation tells subject and object. A test counts
    where the model answers all its condition queries before the edit; a query whose answer is several things
    asks for all of them.
    """
    edit = fields.object("edit")
    prompt, subject, target = _fact(edit)
    # Older publications of the benchmark have the second name.
    before = next((edit.object(name) for name in ("previous_fact", "original_fact") if name in edit), None)
    truth = _fact(before)[2] if before is not None else None
    return EditRecord(
        make_request(edit, prompt, subject, target, truth),
        locality=filled({axis: _tests(fields, *names) for axis, names in _STAYS.items()}),
        portability=filled({axis: _tests(fields, axis) for axis in _FOLLOWS}),
        relation=edit.text("relation"),
        category=fields.text_or_none("example_type") or "",
    )


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
