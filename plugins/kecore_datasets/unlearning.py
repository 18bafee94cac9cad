"""Facts to forget: TOFU, RWKU and MUSE.

An edit has a target, so what forgetting means is said by the variant: what the edited model is to answer instead. The
old answer is the ground truth, and so the rival of the target. What the sets want to stay known is locality.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from kecore.api.errors import DataFormatError
from kecore.api.types import EditRecord, Probe
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Part, Published
from kecore.evaluate.probes import edit_probe, make_request, paraphrases
from kecore_datasets.shared import deal_out, known

__all__ = ["MUSE", "REFUSAL", "RWKU", "TOFU"]

REFUSAL = "I don't know."
"""What a model is to answer where the set publishes no refusal of its own."""

Target = Callable[[Fields], str]


def _refuse(fields: Fields) -> str:
    return REFUSAL


def _field(name: str) -> Target:
    return lambda fields: fields.text(name)


def _first_perturbed(fields: Fields) -> str:
    perturbed = fields.texts("perturbed_answer")
    if not perturbed:
        raise fields.fail("perturbed_answer", "a list of texts that is not empty")
    return perturbed[0]


def _with_kept(objects: Sequence[tuple[str, Any]], kept: Sequence[dict[str, Any]]) -> list[tuple[str, Any]]:
    """Return objects to forget, each with its share of the questions whose answers stay known."""
    shares = deal_out(kept, len(objects))
    return [(where, {**value, "keep": share}) for (where, value), share in zip(objects, shares, strict=True)]


def _kept_probes(fields: Fields) -> list[Probe]:
    """Make locality probes of the questions that a folder's other files ask with this record."""
    probes: list[Probe] = []
    for item in fields.objects_or_none("keep"):
        probe = item.probe("locality", "question", "answer", item.text("axis"))
        probes.append(replace(probe, rivals=item.texts("perturbed_answer")))
    return probes


def _objects(part: Part) -> list[tuple[str, dict[str, Any]]]:
    return [(where, dict(Fields(value, where).values)) for where, value in part.objects]


# --- TOFU


def _tofu(fields: Fields, target: Target) -> EditRecord:
    """Read a question of TOFU (arXiv 2401.06121) about an invented author.

    The rivals of the probe ``truth_ratio``, which has no right answer, are the paraphrased true answer and the
    perturbed ones: forgotten is a fact where none of these is likelier than the others. A published subject must be in
    the question; where there is none, the whole question is the subject.

    Args:
        fields: a question.
        target: reads what the model is to answer.
    """
    question, answer = fields.text("question"), fields.text("answer")
    target_text = target(fields)
    is_learned = target_text == answer
    truth = None if is_learned else answer
    request = make_request(fields, question, _tofu_subject(fields, question), target_text, truth)
    paraphrased = fields.texts("paraphrased_answer")
    edit = edit_probe(request, paraphrased if is_learned else (), paraphrased)
    locality = _kept_probes(fields)
    if "locality" in fields:
        locality.append(fields.object("locality").probe("locality", "question", "answer", "retain"))
    perturbed = fields.texts("perturbed_answer")
    ratio: list[Probe] = []
    if perturbed:
        true_answer = paraphrased[0] if paraphrased else answer
        ratio.append(Probe("portability", request.text, rivals=(true_answer, *perturbed), axis="truth_ratio"))
    return EditRecord(
        request,
        (edit, *paraphrases(edit, fields.texts("paraphrased_question")), *locality, *ratio),
        labels=known(
            category=fields.text_or_none("task_id"), long_form="yes" if target_text not in (REFUSAL, "") else None
        ),
    )


def _tofu_subject(fields: Fields, question: str) -> str | None:
    """Return the subject that a record names, or the person whom the sets made after TOFU name, if asked by name."""
    name = fields.text_or_none("name")
    if "subject" not in fields and name is not None and name in question:
        return name
    return fields.text_or_none("subject")


_TOFU_AXES = ("retain", "real_authors", "world_facts")


def _tofu_files(parts: Sequence[Part]) -> list[tuple[str, Any]]:
    """Return the questions of the one file of facts to forget, with those of the files of facts to keep.

    Raises:
        DataFormatError: there is no file of facts to forget, or there are several.
    """
    by_axis: dict[str, list[Part]] = {}
    for part in parts:
        axis = re.search(r"forget|retain|real_authors|world_facts", part.name)
        by_axis.setdefault(axis[0] if axis else "", []).append(part)
    forget = _prefer_perturbed(by_axis.get("forget", []))
    if len(forget) != 1:
        names = ", ".join(part.name for part in forget) or "none"
        raise DataFormatError(
            "expected one file of facts to forget (forget01_perturbed, forget05_perturbed, ...) beside those to keep, "
            f"got {names}; give one file, or a folder with one of them"
        )
    kept: list[dict[str, Any]] = []
    for axis in _TOFU_AXES:
        for part in _prefer_perturbed(by_axis.get(axis, [])):
            kept += [{**value, "axis": axis} for _, value in _objects(part)]
    return _with_kept(_objects(forget[0]), kept)


def _prefer_perturbed(parts: Sequence[Part]) -> list[Part]:
    """Return the files that have perturbed answers, which are those of the evaluation; all, where none has."""
    return [part for part in parts if "perturbed" in part.name] or list(parts)


TOFU = Layout(
    "tofu",
    ("question", "answer", "perturbed_answer"),
    "question, answer, perturbed_answer, paraphrased_question, paraphrased_answer",
    {
        "refusal": partial(_tofu, target=_refuse),
        "avoidant": partial(_tofu, target=_field("avoidant_answer")),
        "perturbed": partial(_tofu, target=_first_perturbed),
        "learn": partial(_tofu, target=_field("answer")),
    },
    (
        "rephrases", "truth_aliases", "target_aliases", "category", "long_form", "probes", "portability: truth_ratio",
        *(f"locality: {axis}" for axis in _TOFU_AXES),
    ),
    (
        Published(
            "TOFU", "questions about 200 invented authors, some of whom are to be forgotten",
            "4,000; 40, 200 or 400 to forget", "MIT", "hf:locuslab/TOFU", "2401.06121",
        ),
    ),
    merge=_tofu_files,
)  # fmt: skip

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
        axis = attack.text("type").strip().replace(" ", "_") or "level_3"
        probe = attack.probe("portability", "query", "answer", axis)
        asked.append(replace(probe, answers=(REFUSAL,), rivals=probe.answers))
    return EditRecord(request, (edit_probe(request), *_kept_probes(fields), *asked), labels=known(category=person))


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
    probes: list[tuple[str, dict[str, Any]]] = []
    attacks: dict[str, list[dict[str, Any]]] = {}
    neighbours: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        is_neighbour = "neighbor" in PurePosixPath(part.name).name or "neighbor" in part.name
        for where, value in _objects(part):
            fields = Fields(value, where)
            person, level = fields.text("subject"), fields.text("level").strip()
            if is_neighbour or "neighbor" in fields:
                kept = {"axis": f"neighbor_level_{level}", "question": value["query"], "answer": value["answer"]}
                neighbours.setdefault(person, []).append(kept)
            elif level in _RWKU_LEVELS:
                probes.append((where, value))
            else:
                attacks.setdefault(person, []).append(value)
    if not probes:
        raise DataFormatError(
            f"expected forget_level1 or forget_level2 of RWKU, got {', '.join(part.name for part in parts)}"
        )
    by_person: dict[str, list[int]] = {}
    for index, (_, value) in enumerate(probes):
        by_person.setdefault(value["subject"], []).append(index)
    for person, indices in by_person.items():
        for name, all_of_person in (("attacks", attacks), ("keep", neighbours)):
            shares = deal_out(all_of_person.get(person, []), len(indices))
            for index, share in zip(indices, shares, strict=True):
                probes[index][1][name] = share
    return list(probes)


RWKU = Layout(
    "rwku",
    ("query", "answer", "level", "type", "subject"),
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
        (edit_probe(request), *_kept_probes(fields)),
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
            kept += [{**value, "axis": "retain"} for _, value in _objects(part)]
        else:
            forget += _objects(part)
    if not forget:
        raise DataFormatError(
            f"expected MUSE's forget_qa or verbmem/forget, got {', '.join(part.name for part in parts)}"
        )
    return _with_kept(forget, kept)


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
