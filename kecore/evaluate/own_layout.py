"""kecore's own layout of records: reading an object of it, and writing a record as one.

The layout has a field for each group of probes that published data sets share: ``rephrases``, ``neighbourhood``,
``locality``, ``portability``, ``multi_hop``, ``generation_prompts``. Probes that fit none of them stand in ``probes``
with everything that they hold. ``docs/datasets.md`` lists the fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast, get_args

from kecore.api.errors import DataFormatError, RequestError
from kecore.api.types import (
    BackgroundKind,
    EditRecord,
    EditRequest,
    NamesAll,
    OneAnswer,
    Probe,
    ProbeKind,
    Rule,
    SafeReply,
)
from kecore.evaluate.fields import Fields
from kecore.evaluate.probes import (
    Chain,
    all_probes,
    chain_probes,
    chains_of,
    edit_probe,
    make_request,
    make_test,
    neighbours,
    on_axes,
    openings,
    paraphrases,
)

__all__ = ["FIELDS", "read_record", "record_to_json"]

_LISTS = ("rephrases", "neighbourhood", "generation_prompts", "target_aliases", "truth_aliases", "references")
_LABELS = ("relation", "target_id", "category")
_FLAGS = ("long_form", "safety")
_REQUEST = ("id", "prompt", "subject", "target", "target_new", "ground_truth")
_GROUPS = ("locality", "portability", "joint", "multi_hop", "probes")
FIELDS = (*_REQUEST, *_LISTS, "source", *_LABELS, *_GROUPS, *_FLAGS, "notes")
"""Names of the fields of a record."""

_ANSWER = ("prompt", "answers", "also")
_TEST = (*_ANSWER, "conditions", "others", "need")
_PROBE = (*_ANSWER, "kind", "axis", "rivals", "safe", "test", "need", "conditions")
_KINDS = (*get_args(ProbeKind), *get_args(BackgroundKind))


def read_record(fields: Fields) -> EditRecord:
    """Make a record of an object in kecore's own layout.

    Raises:
        DataFormatError: a field is missing, of another type, or unknown, since a misspelt one would silently drop
            probes.
    """
    request = _read_request(fields, FIELDS)
    rule: Rule = SafeReply(request.target) if fields.flag("safety") else OneAnswer()
    edit = edit_probe(request, fields.texts("target_aliases"), fields.texts("truth_aliases"), rule)
    extra = tuple(map(_read_probe, fields.objects_or_none("probes")))
    probes = (
        *paraphrases(edit, fields.texts("rephrases")),
        *neighbours(edit, fields.texts("neighbourhood")),
        *_read_axes(fields, "locality", OneAnswer()),
        *_read_axes(fields, "portability", rule),
        *_read_chains(fields),
        *_read_openings(fields, request),
        *extra,
    )
    if not any(probe.kind == "edit" for probe in extra):
        probes = (edit, *probes)
    labels = {name: fields.text_or_none(name) or "" for name in _LABELS}
    if fields.flag("long_form"):
        labels["long_form"] = "yes"
    return EditRecord(
        request,
        probes,
        source=fields.text_or_none("source") or "",
        joint=tuple(_read_request(item, _REQUEST) for item in fields.objects_or_none("joint")),
        labels=_without_blanks(labels),
        notes=_read_notes(fields),
    )


def _read_notes(fields: Fields) -> dict[str, str]:
    if "notes" not in fields:
        return {}
    notes = fields.object("notes")
    return {name: notes.text(name) for name in notes.values}


def _read_request(fields: Fields, known: Sequence[str]) -> EditRequest:
    _refuse_unknown(fields, known)
    target = fields.text("target_new" if "target_new" in fields else "target")
    truth = fields.text_or_none("ground_truth")
    prompt, subject, id = fields.text("prompt"), fields.text_or_none("subject"), fields.id("id")
    if subject is not None:
        return make_request(fields, prompt, subject, target, truth, id)
    try:
        return EditRequest(prompt, None, target, truth, id)
    except RequestError as error:
        raise DataFormatError(f"{fields.where}: {error}") from None


def _read_openings(fields: Fields, request: EditRequest) -> tuple[Probe, ...]:
    prompts, references = fields.texts("generation_prompts"), fields.texts("references")
    if references and not prompts:
        prompts = (request.text,)
    return openings(prompts, references)


def _read_axes(fields: Fields, kind: ProbeKind, unanswered: Rule) -> list[Probe]:
    """Read the tests of an object of lists by axis; ``unanswered`` is the rule of a prompt without answers."""
    if kind not in fields:
        return []
    group = fields.object(kind)
    probes: list[Probe] = []
    for axis in group.values:
        for number, item in enumerate(group.objects(axis)):
            for probe in _read_test(item, kind, axis, number):
                probes.append(probe if probe.answers else replace(probe, rule=unanswered))
    return probes


def _read_test(fields: Fields, kind: ProbeKind, axis: str, number: int) -> tuple[Probe, ...]:
    """Read a probe with the further prompts of its test; need and conditions are those of the whole test."""
    _refuse_unknown(fields, _TEST)
    need = fields.text_or_none("need") or "any"
    if need != "any" and need != "all":
        raise fields.fail("need", "'any' or 'all'")
    conditions = tuple(_read_answer(item, "condition") for item in fields.objects_or_none("conditions"))
    first = _read_answer(fields, kind, known=_TEST)
    others = [_read_answer(item, kind, known=_TEST) for item in fields.objects_or_none("others")]
    probes = [replace(probe, axis=axis, need=need, conditions=conditions) for probe in (first, *others)]
    return make_test(probes, number)


def _read_answer(fields: Fields, kind: ProbeKind | BackgroundKind, known: Sequence[str] = _TEST) -> Probe:
    """Read a prompt, its answers, and what must be named beside them."""
    _refuse_unknown(fields, known)
    probe = fields.probe(kind, "prompt", "answers")
    also: Any = fields.values.get("also", [])
    if not isinstance(also, list):
        raise fields.fail("also", "a list of lists of texts")
    things = cast("list[Any]", also)
    others = tuple(Fields({"also": names}, fields.where).texts("also") for names in things)
    return replace(probe, rule=NamesAll(others)) if others else probe


def _read_chains(fields: Fields) -> list[Probe]:
    probes: list[Probe] = []
    for number, chain in enumerate(fields.objects_or_none("multi_hop")):
        _refuse_unknown(chain, ("questions", "answers", "old_answers", "hops", "old_hops"))
        if not chain.texts("questions"):
            raise chain.fail("questions", "a list of texts that is not empty")
        probes += chain_probes(
            number,
            chain.texts("questions"),
            chain.answers("answers"),
            chain.answers_or_none("old_answers"),
            hops=[_read_answer(hop, "hop") for hop in chain.objects_or_none("hops")],
            old_hops=[_read_answer(hop, "old_hop") for hop in chain.objects_or_none("old_hops")],
        )
    return probes


def _read_probe(fields: Fields) -> Probe:
    """Read a probe with everything that it holds."""
    probe = _read_answer(fields, "edit", known=_PROBE)
    kind, need = fields.text("kind"), fields.text_or_none("need") or "any"
    if kind not in _KINDS:
        raise fields.fail("kind", f"one of {', '.join(_KINDS)}")
    if need != "any" and need != "all":
        raise fields.fail("need", "'any' or 'all'")
    safe = fields.text_or_none("safe")
    return replace(
        probe,
        kind=cast("ProbeKind", kind),
        rivals=fields.answers_or_none("rivals"),
        axis=fields.text_or_none("axis") or "",
        rule=probe.rule if safe is None else SafeReply(safe),
        test=fields.text_or_none("test") or "",
        need=need,
        conditions=tuple(map(_read_probe, fields.objects_or_none("conditions"))),
    )


def _refuse_unknown(fields: Fields, known: Sequence[str]) -> None:
    unknown = sorted(set(fields.values) - set(known))
    if unknown:
        raise DataFormatError(f"{fields.where}: unknown field '{unknown[0]}'; known fields: {', '.join(known)}")


def record_to_json(record: EditRecord) -> dict[str, Any]:
    """Return a record in kecore's own layout, one line of a JSONL file; empty fields are left out.

    Examples:
        >>> record_to_json(EditRecord(EditRequest("{} is in", "Rome", "Gaul", id="1")))
        {'prompt': '{} is in', 'subject': 'Rome', 'target': 'Gaul', 'id': '1'}
    """
    grouped = _groups_to_json(record)
    read = replace(read_record(Fields(grouped, f"record '{record.request.id}'")), joint=record.joint)
    same = _normalised(all_probes(read)) == _normalised(all_probes(record))
    probes = grouped if same else {"probes": list(map(_probe_to_json, record.probes))}
    joint = [_without_blanks(request.to_json()) for request in record.joint]
    labels = {name: record.labels.get(name, "") for name in _LABELS}
    values: dict[str, Any] = {
        **record.request.to_json(),
        **probes,
        "joint": joint,
        "long_form": record.labels.get("long_form") == "yes",
        "source": record.source,
        **labels,
        "notes": dict(record.notes),
    }
    return _without_blanks(values)


def _groups_to_json(record: EditRecord) -> dict[str, Any]:
    """Return the request, and the probes in the groups that they belong to."""
    edit = all_probes(record)[0]
    generation = record.probes_of("generation")
    prompts = list(record.prompts_of("generation"))
    values: dict[str, Any] = {
        **record.request.to_json(),
        "rephrases": list(record.prompts_of("paraphrase")),
        "neighbourhood": list(record.prompts_of("neighbourhood")),
        # The edited prompt opens the free text of a record without an opening.
        "generation_prompts": [] if prompts == [record.request.text] else prompts,
        "target_aliases": list(edit.answers[1:]),
        "truth_aliases": list(edit.rivals[1:]),
        "references": list(generation[0].answers) if generation else [],
        "locality": _axes_to_json(record.probes_of("locality")),
        "portability": _axes_to_json(record.probes_of("portability")),
        "multi_hop": [_chain_to_json(chain) for chain in chains_of(record) if chain.questions],
        "safety": isinstance(edit.rule, SafeReply),
    }
    return _without_blanks(values)


def _axes_to_json(probes: Iterable[Probe]) -> dict[str, list[dict[str, Any]]]:
    axes: dict[str, list[dict[str, Any]]] = {}
    for axis, on_axis in on_axes(probes).items():
        tests: dict[str, list[Probe]] = {}
        for index, probe in enumerate(on_axis):
            tests.setdefault(probe.test or f"#{index}", []).append(probe)
        axes[axis] = [_test_to_json(test) for test in tests.values()]
    return axes


def _test_to_json(probes: Sequence[Probe]) -> dict[str, Any]:
    first, *others = probes
    values = {
        **_answer_to_json(first),
        "conditions": list(map(_answer_to_json, first.conditions)),
        "others": list(map(_answer_to_json, others)),
        "need": first.need if others else "",
    }
    return _without_blanks(values)


def _answer_to_json(probe: Probe) -> dict[str, Any]:
    also: list[list[str]] = []
    if isinstance(probe.rule, NamesAll):
        also = [list(names) for names in probe.rule.others]
    return _without_blanks({"prompt": probe.prompt, "answers": list(probe.answers), "also": also})


def _chain_to_json(chain: Chain) -> dict[str, Any]:
    first = chain.questions[0]
    values = {
        "old_answers": list(first.rivals),
        "hops": list(map(_answer_to_json, chain.hops)),
        "old_hops": list(map(_answer_to_json, chain.old_hops)),
    }
    questions = [probe.prompt for probe in chain.questions]
    return {"questions": questions, "answers": list(first.answers), **_without_blanks(values)}


def _probe_to_json(probe: Probe) -> dict[str, Any]:
    """Return a probe with everything that it holds."""
    values = {
        "kind": probe.kind,
        **_answer_to_json(probe),
        "rivals": list(probe.rivals),
        "axis": probe.axis,
        "safe": probe.rule.example if isinstance(probe.rule, SafeReply) else "",
        "test": probe.test,
        "need": "" if probe.need == "any" else probe.need,
        "conditions": list(map(_probe_to_json, probe.conditions)),
    }
    return _without_blanks(values)


def _normalised(probes: Iterable[Probe]) -> list[Probe]:
    """Return probes as a reader would make them, with numbers for the names of their tests."""
    numbers: dict[tuple[str, str, str], str] = {}
    normal: list[Probe] = []
    for probe in probes:
        test = ""
        if probe.test:
            group = "chain" if probe.kind in ("multi_hop", "hop", "old_hop") else probe.kind
            test = numbers.setdefault((group, probe.axis, probe.test), str(len(numbers)))
        normal.append(replace(_stripped(probe), test=test))
    return normal


def _stripped(probe: Probe) -> Probe:
    """Return a probe without outer white space, blank texts and repeated answers."""
    rule = probe.rule
    if isinstance(rule, NamesAll):
        rule = NamesAll(tuple(map(_texts, rule.others)))
    return replace(
        probe,
        prompt=probe.prompt.strip(),
        answers=_texts(probe.answers),
        rivals=_texts(probe.rivals),
        rule=rule,
        conditions=tuple(map(_stripped, probe.conditions)),
    )


def _texts(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))


def _without_blanks(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value}
