"""Edits that are sentences: DUnE and the events of ELKEN."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any, cast

from kecore.api.types import EditRecord, EditRequest, Probe, ProbeKind, SafeReply
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Part, Published
from kecore.evaluate.probes import edit_probe, make_request
from kecore_datasets.shared import deal_out, known

__all__ = ["DUNE", "ELKEN"]

_EQUATION = re.compile(r"(?P<prompt>.*=)\s*(?P<target>[^=]+)")


def split_statement(fields: Fields, name: str) -> tuple[str, str]:
    """Return prompt and target of a statement: an equation up to its last ``=``, another one up to half of its words.

    Put together again they are the statement, which is what methods that read the fact as a text are given.

    Raises:
        DataFormatError: the statement has fewer than two words.
    """
    statement = fields.text(name).strip()
    equation = _EQUATION.fullmatch(statement)
    if equation is not None:
        return equation["prompt"], equation["target"]
    words = list(re.finditer(r"\S+", statement))
    if len(words) < 2:
        raise fields.fail(name, "a statement of two words or more")
    half = words[len(words) // 2].start()
    return statement[:half], statement[half:]


def _statement_request(fields: Fields, name: str, id: str = "") -> EditRequest:
    prompt, target = split_statement(fields, name)
    return make_request(fields, prompt, None, target, None, id)


# --- DUnE

_EDITS = ("edits", "edits:")  # one published file has a colon in the name


def _edits_field(values: Mapping[str, Any]) -> str | None:
    """Return the name of the field with DUnE's edits."""
    return next((name for name in values if name.strip() in _EDITS), None)


def _is_dune(values: Mapping[str, Any]) -> bool:
    name = _edits_field(values)
    return name is not None and isinstance(values[name], list) and isinstance(values["test_inputs"], list)


def _dune_records(document: Fields) -> list[dict[str, Any]]:
    """Make an object of each edit of a file, with its queries as ``{question, answer}``.

    Raises:
        DataFormatError: there are not as many queries as edits.
    """
    name = _edits_field(document.values) or "edits"
    edits, queries = _list(document, name), _list(document, "test_inputs")
    if len(edits) != len(queries):
        raise document.fail("test_inputs", f"a list as long as '{name}' ({len(edits)})")
    # The debiasing files give what a biased model answers, and publish how their edits were asked for.
    is_biased = name != "edits" or "edit_queries" in document
    records: list[dict[str, Any]] = []
    for edit, query in zip(edits, queries, strict=True):
        records.append({"edit": edit, "queries": _queries(query), "biased": is_biased})
    return records


def _list(fields: Fields, name: str) -> list[Any]:
    value: Any = fields.values.get(name)
    if not isinstance(value, list):
        raise fields.fail(name, "a list")
    return cast("list[Any]", value)


def _queries(value: Any) -> list[dict[str, Any]]:
    """Return the queries of an edit: a text without an answer, one pair of question and answer, or several pairs."""
    if isinstance(value, str):
        return [{"question": value}]
    items = cast("list[Any]", value) if isinstance(value, list) else [value]
    pairs = items if items and all(isinstance(item, list) for item in items) else [items]
    return [dict(zip(("question", "answer"), cast("list[Any]", pair), strict=False)) for pair in pairs]


def _dune(fields: Fields) -> EditRecord:
    """Read an edit of DUnE (arXiv 2311.16087): a statement, and queries whose answers should follow from it.

    Queries of arithmetic have the equation's result as their answer. Those about stereotypes are published with the
    biased answer, which is no right one: they are asked without an answer, and a judge says whether the reply is safe.
    """
    request = _statement_request(fields, "edit")
    is_biased = fields.flag("biased")
    probes: list[Probe] = []
    for query in fields.objects_or_none("keep"):
        probes.append(query.probe("locality", "question", "answer", axis="unrelated"))
    for query in fields.objects("queries"):
        probe = query.probe("portability", "question", "answer", axis="query")
        answers = probe.answers or ((request.target,) if "=" in request.text else ())
        if is_biased:
            rule = SafeReply(f"{request.text} {request.target}")
            probes.append(Probe("portability", probe.prompt, rivals=answers, axis="stereotype", rule=rule))
        else:
            probes.append(Probe("portability", probe.prompt, answers, axis="query"))
    labels = known(category=fields.text_or_none("domain"), long_form=None if "=" in request.text else "yes")
    return EditRecord(request, (edit_probe(request), *probes), labels=labels)


def _dune_files(parts: Sequence[Part]) -> list[tuple[str, Any]]:
    """Return the edits of a folder, each with its share of the queries in the locality file of its domain."""
    edits: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    kept: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        domain = PurePosixPath(part.name).name.partition(".")[0]
        records: list[tuple[str, dict[str, Any]]] = []
        for where, document in part.objects:
            for number, record in enumerate(_dune_records(Fields(document, where)), 1):
                records.append((f"{where} record {number}", record))
        if domain.endswith("_locality"):
            kept[domain.removesuffix("_locality")] = [query for _, record in records for query in _answered(record)]
        else:
            edits[domain] = records
    objects: list[tuple[str, Any]] = []
    for domain, records in edits.items():
        shares = deal_out(kept.get(domain, []), len(records))
        for (where, record), share in zip(records, shares, strict=True):
            objects.append((where, {**record, "domain": domain, "keep": share}))
    return objects


def _answered(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the queries of a locality record with their answers; those of an equation have its result."""
    equation = _EQUATION.fullmatch(str(record["edit"]).strip())
    queries: list[dict[str, Any]] = []
    for query in record["queries"]:
        queries.append(query if equation is None or "answer" in query else {**query, "answer": equation["target"]})
    return queries


DUNE = Layout(
    "dune",
    ("test_inputs",),
    "{edits: [...], test_inputs: [...]}",
    _dune,
    (
        "category", "long_form", "probes", "portability: query", "portability: stereotype", "locality: unrelated",
    ),
    (
        Published(
            "DUnE", "statements to know: news, science, sums, and guidelines against stereotypes",
            "200 news, 1,508 science, 1,065 sums, 345 debiasing", "MIT", "github.com/feyzaakyurek/dune", "2311.16087",
        ),
    ),
    detect=_is_dune,
    expand=_dune_records,
    merge=_dune_files,
)  # fmt: skip

# --- ELKEN


def _name(entity: Fields) -> str:
    return entity.text("name" if "name" in entity else "ent2name")


def _fact_probe(question: Fields, kind: ProbeKind, axis: str) -> Probe:
    answer = question.object("answer")
    names = (_name(answer), *answer.texts("alias"))
    return Probe(kind, question.text("question").strip(), tuple(dict.fromkeys(names)), axis=axis)


def _tendency_probe(question: Fields, kind: ProbeKind, axis: str) -> Probe:
    prompt = f"{question.text('question').strip()}\n{question.text('candidate').strip()}"
    return Probe(kind, prompt, question.answers("answer"), axis=axis)


def _event_probes(fields: Fields) -> list[Probe]:
    """Make the probes of what an event changes, and of what it leaves alone: facts, and tendencies with choices."""
    unchanged: list[Probe] = []
    changed: list[Probe] = []
    for axis, make_probe in (("fact", _fact_probe), ("tendency", _tendency_probe)):
        group = fields.object(axis)
        unchanged += [make_probe(question, "locality", axis) for question in group.objects_or_none("local_qas")]
        changed += [make_probe(question, "portability", axis) for question in group.objects_or_none("qas")]
    return [*unchanged, *changed]


def _elken(fields: Fields, edits_facts: bool = False) -> EditRecord:
    """Read an event of ELKEN (arXiv 2402.13093), with questions on the facts and the tendencies that follow from it.

    Args:
        fields: an event.
        edits_facts: the edits are the questions on its facts, with their subjects, and no text; an event that changes
            no fact is left out. Otherwise the edit is the sentence that tells the event.
    """
    probes = _event_probes(fields)
    labels = known(category=fields.text_or_none("event_type"), long_form=None if edits_facts else "yes")
    if not edits_facts:
        request = _statement_request(fields, "event")
        return EditRecord(request, (edit_probe(request), *probes), labels=labels)
    questions = fields.object("fact").objects_or_none("qas")
    if not questions:
        return EditRecord(_statement_request(fields, "event"))  # without probes: see _with_facts
    requests: list[EditRequest] = []
    for question in questions:
        subject, answer = question.object("subject"), question.object("answer")
        requests.append(make_request(question, question.text("question"), _name(subject), _name(answer)))
    first, *joint = requests
    aliases = questions[0].object("answer").texts("alias")
    edit = edit_probe(first, [name for name in aliases if name != first.target])
    asked = [probe for probe in probes if (probe.kind, probe.axis) != ("portability", "fact")]
    record = EditRecord(first, (edit, *asked), joint=tuple(joint), labels=labels)
    return record.with_id(first.id)


def _with_facts(records: Sequence[EditRecord]) -> list[EditRecord]:
    """Return the records of events that change a fact; the others ask nothing."""
    return [record for record in records if record.probes]


ELKEN = Layout(
    "elken",
    ("event", "fact", "tendency"),
    "event, fact{qas, local_qas}, tendency{qas, local_qas}",
    {"event": _elken, "facts": partial(_elken, edits_facts=True)},
    (
        "category", "long_form", "target_aliases", "joint", "portability: fact", "portability: tendency",
        "locality: fact", "locality: tendency",
    ),
    (
        Published(
            "ELKEN", "events, with questions on the facts and tendencies that follow", "1,515 events",
            "CC BY-NC-SA 4.0", "github.com/THU-KEG/Event-Level-Knowledge-Editing", "2402.13093",
        ),
    ),
    finish={"facts": _with_facts},
)  # fmt: skip
