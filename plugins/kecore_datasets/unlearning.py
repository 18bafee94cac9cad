"""Facts to forget: RWKU, MUSE and KnowUnDo (TOFU has a file of its own)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from kecore.api.errors import DataFormatError
from kecore.api.types import EditRecord, Probe
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Part, Published
from kecore.evaluate.probes import edit_probe, make_request
from kecore_datasets.forgetting import REFUSAL, kept_probes, objects_of, with_kept
from kecore_datasets.shared import deal_out, known

__all__ = ["KNOWUNDO", "MUSE", "RWKU"]

# --- RWKU

_ATTACKS = (
    "prefix injection", "affirmative suffix", "role playing", "multiple choice", "reverse query",
    "synonym manipulation", "background hint", "incontext learning", "cross lingual",
)  # fmt: skip
_RWKU_LEVELS = ("1", "2")
_ENTITY_PROMPT = "Tell me about {}."


def _rwku(fields: Fields, edits_entity: bool = False) -> EditRecord:
    """Read a probe of RWKU (arXiv 2406.10890): something that a model knows about a famous person.

    Attacks (level 3) are portability by the kind of attack, neighbours locality by level; they come from the other
    files of a folder. What counts on an attack is the target as well.

    Args:
        fields: a probe of level 1 or 2.
        edits_entity: the edit is a prompt about the person, whom alone RWKU gives to forget, and the probe is asked;
            otherwise the probe itself is edited.
    """
    level, query, answer = fields.text("level").strip(), fields.text("query"), fields.text("answer")
    if level not in _RWKU_LEVELS or "neighbor" in fields:
        kind = "asks what stays known" if "neighbor" in fields else "is an attack"
        raise DataFormatError(
            f"{fields.where}: field 'level': this probe of level {level} {kind}, which is no edit of its own; load "
            "the folder that also holds forget_level1 and forget_level2"
        )
    person = fields.text("subject").strip()
    if edits_entity:
        request = make_request(fields, _ENTITY_PROMPT, person, REFUSAL)
        asked = [Probe("portability", query.strip(), (REFUSAL,), (answer.strip(),), axis=f"level_{level}")]
    else:
        request = make_request(fields, query, person if person in query else None, REFUSAL, answer)
        asked: list[Probe] = []
    for attack in fields.objects_or_none("attacks"):
        axis = (attack.text_or_none("type") or "level_3").replace(" ", "_")
        probe = attack.probe("portability", "query", "answer", axis)
        asked.append(replace(probe, answers=(REFUSAL,), rivals=probe.answers))
    return EditRecord(request, (edit_probe(request), *kept_probes(fields), *asked), labels=known(category=person))


def _one_edit_a_person(records: Sequence[EditRecord]) -> list[EditRecord]:
    """Return a record of each person, with everything that is asked about them."""
    by_person: dict[str, list[EditRecord]] = {}
    for record in records:
        by_person.setdefault(record.labels["category"], []).append(record)
    merged: list[EditRecord] = []
    for first, *further in by_person.values():
        of_person = [first, *further]
        kept = [probe for record in of_person for probe in record.probes_of("locality")]
        asked = [probe for record in of_person for probe in record.probes_of("portability")]
        merged.append(replace(first, probes=(*first.probes_of("edit"), *kept, *asked)))
    return merged


def _rwku_files(parts: Sequence[Part]) -> list[tuple[str, Any]]:
    """Return the probes of levels 1 and 2, each with its share of its person's attacks and neighbours.

    Raises:
        DataFormatError: there are no such probes.
    """
    probes: dict[str, list[tuple[str, dict[str, Any]]]] = {}  # each by the person
    attacks: dict[str, list[dict[str, Any]]] = {}
    neighbours: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        for where, value in objects_of(part):
            fields = Fields(value, where)
            person, level = fields.text("subject"), fields.text("level").strip()
            if "neighbor" in part.name or "neighbor" in fields:
                kept = {"question": fields.text("query"), "answer": fields.text("answer")}
                neighbours.setdefault(person, []).append({**kept, "axis": f"neighbor_level_{level}"})
            elif level in _RWKU_LEVELS:
                probes.setdefault(person, []).append((where, value))
            else:
                attacks.setdefault(person, []).append(value)
    if not probes:
        raise DataFormatError(
            f"expected forget_level1 or forget_level2 of RWKU, got {', '.join(part.name for part in parts)}"
        )
    objects: list[tuple[str, Any]] = []
    for person, of_person in probes.items():
        with_neighbours = with_kept(of_person, neighbours.get(person, []))
        shares = deal_out(attacks.get(person, []), len(of_person))
        for (where, value), share in zip(with_neighbours, shares, strict=True):
            objects.append((where, {**value, "attacks": share}))
    return objects


RWKU = Layout(
    "rwku",
    ("query", "answer", "level", "subject"),
    "query, answer, level, type, subject",
    {"probes": _rwku, "entity": partial(_rwku, edits_entity=True)},
    (
        "category", "probes", "portability: level_1", "portability: level_2", "portability: level_3",
        *(f"portability: {attack.replace(' ', '_')}" for attack in _ATTACKS),
        *(f"locality: neighbor_level_{level}" for level in _RWKU_LEVELS),
    ),
    (
        Published(
            "RWKU", "what models know about 200 famous persons who are to be forgotten",
            "13,131 probes of 200 persons", "CC BY 4.0", "hf:jinzhuoran/RWKU", "2406.10890",
        ),
    ),
    merge=_rwku_files,
    finish={"entity": _one_edit_a_person},
)  # fmt: skip

# --- MUSE


def _is_muse(values: Mapping[str, Any]) -> bool:
    """Return whether an object is a passage of MUSE or a question of it; its questions look like anybody's."""
    return set(values) - {"keep"} in ({"prompt", "gt"}, {"question", "answer"})


def _muse(fields: Fields, learns: bool = False) -> EditRecord:
    """Read a record of MUSE (arXiv 2407.06460): a question about the texts to forget, or the opening of a passage.

    Args:
        fields: ``question`` and ``answer`` (knowledge), or ``prompt`` and ``gt`` (the passage's continuation).
        learns: the target is the answer or continuation, for a model that is to know the texts first.
    """
    is_passage = "gt" in fields
    prompt, answer = ("prompt", "gt") if is_passage else ("question", "answer")
    old_answer = fields.text(answer)
    target, truth = (old_answer, None) if learns else (REFUSAL, old_answer)
    request = make_request(fields, fields.text(prompt), None, target, truth)
    return EditRecord(
        request,
        (edit_probe(request), *kept_probes(fields)),
        labels=known(
            category="verbmem" if is_passage else "knowmem", long_form="yes" if is_passage and learns else None
        ),
    )


def _muse_files(parts: Sequence[Part]) -> list[tuple[str, Any]]:
    """Return questions and passages to forget, with the questions to keep; examples (``_icl``) are not read.

    Raises:
        DataFormatError: nothing is to be forgotten.
    """
    forget: list[tuple[str, dict[str, Any]]] = []
    kept: list[dict[str, Any]] = []
    for part in parts:
        if "_icl" in part.name:
            continue
        if "retain" in part.name:
            kept += [{**value, "axis": "retain"} for _, value in objects_of(part)]
        else:
            forget += objects_of(part)
    if not forget:
        raise DataFormatError(
            f"expected MUSE's forget_qa or verbmem/forget, got {', '.join(part.name for part in parts)}"
        )
    return with_kept(forget, kept)


MUSE = Layout(
    "muse",
    (),
    "question, answer (knowmem) or prompt, gt (verbmem)",
    {"refusal": _muse, "learn": partial(_muse, learns=True)},
    ("category", "long_form", "locality: retain"),
    (
        Published(
            "MUSE", "news and books to be forgotten: questions about them, and passages",
            "News: 100 questions, 100 passages; Books the same", "CC BY 4.0",
            "hf:muse-bench/MUSE-News, hf:muse-bench/MUSE-Books", "2407.06460",
        ),
    ),
    detect=_is_muse,
    merge=_muse_files,
)  # fmt: skip

# --- KnowUnDo


def _is_knowundo(values: Mapping[str, Any]) -> bool:
    for name in ("train", "val"):
        questions: Any = values[name]
        if not isinstance(questions, list) or not questions:
            return False
        if not all(isinstance(item, Mapping) and {"text", "labels"} <= item.keys() for item in questions[:1]):
            return False
    return True


def _as_question(fields: Fields) -> dict[str, Any]:
    return {"question": fields.text("text"), "answer": fields.text("labels")}


def _knowundo_records(document: Fields) -> list[dict[str, Any]]:
    """Make an object of each question to train on, with its share of those to validate on."""
    train = [_as_question(item) for item in document.objects("train")]
    shares = deal_out([_as_question(item) for item in document.objects("val")], len(train))
    return [{**question, "asked": share} for question, share in zip(train, shares, strict=True)]


def _knowundo(fields: Fields, learns: bool = False) -> EditRecord:
    """Read a question of KnowUnDo (arXiv 2407.01920): copyrighted or private, and so to be forgotten.

    Questions to validate on are portability, with the same refusal; those of ``retention`` stay known.
    """
    answer = fields.text("answer")
    target, truth = (answer, None) if learns else (REFUSAL, answer)
    request = make_request(fields, fields.text("question"), None, target, truth)
    asked: list[Probe] = []
    for item in fields.objects_or_none("asked"):
        probe = item.probe("portability", "question", "answer", "val")
        asked.append(probe if learns else replace(probe, answers=(REFUSAL,), rivals=probe.answers))
    return EditRecord(
        request,
        (edit_probe(request), *kept_probes(fields), *asked),
        labels=known(long_form="yes" if learns else None),
    )


def _knowundo_files(parts: Sequence[Part]) -> list[tuple[str, Any]]:
    """Return the questions of the files to unlearn, with all questions of the files to retain.

    Raises:
        DataFormatError: nothing is to be unlearned.
    """
    forget: list[tuple[str, dict[str, Any]]] = []
    kept: list[dict[str, Any]] = []
    for part in parts:
        for where, value in part.objects:
            document = Fields(value, where)
            if "retention" in part.name:
                for split in ("train", "val"):
                    kept += [{**_as_question(item), "axis": "retention"} for item in document.objects(split)]
                continue
            for number, record in enumerate(_knowundo_records(document), 1):
                forget.append((f"{where} record {number}", record))
    if not forget:
        raise DataFormatError(f"expected KnowUnDo's unlearn file, got {', '.join(part.name for part in parts)}")
    return with_kept(forget, kept)


KNOWUNDO = Layout(
    "knowundo",
    ("train", "val"),
    "{train: [{text, labels}], val: [{text, labels}]}",
    {"refusal": _knowundo, "learn": partial(_knowundo, learns=True)},
    ("long_form", "probes", "portability: val", "locality: retention"),
    (
        Published(
            "KnowUnDo", "copyrighted and private texts to be forgotten beside general knowledge to be kept",
            "two domains", "MIT", "hf:zjunlp/KnowUnDo", "2407.01920",
        ),
    ),
    detect=_is_knowundo,
    expand=_knowundo_records,
    merge=_knowundo_files,
)  # fmt: skip
