"""TOFU: questions about invented authors, some of whom are to be forgotten."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from kecore.api.errors import DataFormatError
from kecore.api.types import EditRecord, Probe
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Part, Published
from kecore.evaluate.probes import edit_probe, make_request, paraphrases
from kecore_datasets.forgetting import REFUSAL, kept_probes, objects_of, with_kept
from kecore_datasets.shared import deal_again, known

__all__ = ["TOFU"]

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
    locality = kept_probes(fields)
    if "locality" in fields:
        locality.append(fields.object("locality").probe("locality", "question", "answer", "retain"))
    perturbed = fields.texts("perturbed_answer")
    ratio: list[Probe] = []
    if perturbed:
        true_answer = paraphrased[0] if paraphrased else answer
        ratio.append(Probe("portability", request.text, rivals=(true_answer, *perturbed), axis="truth_ratio"))
    category = " ".join(fields.texts("splits")) or fields.text_or_none("task_id")
    labels = known(category=category, long_form=None if target_text == REFUSAL else "yes")
    questions = paraphrases(edit, fields.texts("paraphrased_question"))
    return EditRecord(request, (edit, *questions, *locality, *ratio), labels=labels)


def _tofu_subject(fields: Fields, question: str) -> str | None:
    """Return the subject that a record names, or the person whom the sets made after TOFU name, if asked by name."""
    name = fields.text_or_none("name")
    if "subject" not in fields and name is not None and name in question:
        return name
    return fields.text_or_none("subject")


_TOFU_AXES = ("retain", "real_authors", "world_facts")


def _tofu_split(fields: Fields, number: int) -> EditRecord:
    """Read a question of which a folder says whether its split forgets it; one that is kept has no category."""
    record = _tofu(fields, _refuse)
    if f"forget{number:02d}" in fields.texts("splits"):
        return record
    return replace(record, labels={name: text for name, text in record.labels.items() if name != "category"})


def _of_one_split(records: Sequence[EditRecord]) -> list[EditRecord]:
    """Return the questions that a split forgets, which share what is asked of the facts to keep."""
    chosen = [record for record in records if "category" in record.labels]
    return deal_again(chosen, records, "locality")


def _tofu_files(parts: Sequence[Part]) -> list[tuple[str, Any]]:
    """Return the questions of the largest file of facts to forget, with those of the files of facts to keep.

    The splits lie in each other (1 % in 5 % in 10 % of the facts); each question is given the splits that hold it.

    Raises:
        DataFormatError: there is no file of facts to forget.
    """
    by_axis: dict[str, list[Part]] = {}
    for part in parts:
        axis = re.search(r"forget|retain|real_authors|world_facts", part.name)
        by_axis.setdefault(axis[0] if axis else "", []).append(part)
    splits: dict[str, set[str]] = {}  # questions by the name of their split
    largest: list[tuple[str, dict[str, Any]]] = []
    for part in _prefer_perturbed(by_axis.get("forget", [])):
        facts = objects_of(part)
        name = re.search(r"forget\d*", part.name)
        splits[name[0] if name else part.name] = {str(value.get("question")) for _, value in facts}
        largest = max(largest, facts, key=len)
    if not largest:
        raise DataFormatError(
            "expected a file of facts to forget, such as forget10_perturbed, beside those to keep, got "
            f"{', '.join(part.name for part in parts)}"
        )
    for _, value in largest:
        value["splits"] = sorted(name for name, asked in splits.items() if str(value.get("question")) in asked)
    kept: list[dict[str, Any]] = []
    for axis in _TOFU_AXES:
        for part in _prefer_perturbed(by_axis.get(axis, [])):
            kept += [{**value, "axis": axis} for _, value in objects_of(part)]
    return with_kept(largest, kept)


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
        "forget-N": _tofu_split,
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
    finish={"forget-N": _of_one_split},
)  # fmt: skip
