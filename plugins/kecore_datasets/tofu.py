"""TOFU: questions about invented authors, some of whom are to be forgotten."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from kecore.api.errors import DataFormatError
from kecore.api.types import EditRecord, Probe
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Part, Published
from kecore.evaluate.probes import edit_probe, make_request, paraphrases
from kecore_datasets.forgetting import REFUSAL, kept_probes, objects_of, with_kept
from kecore_datasets.shared import known

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
            kept += [{**value, "axis": axis} for _, value in objects_of(part)]
    return with_kept(objects_of(forget[0]), kept)


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
