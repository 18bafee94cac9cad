"""Edits in one language and questions in others: MzsRE, BMIKE-53, MLaKE; and the Chinese CKnowEdit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kecore.api.errors import DataFormatError
from kecore.api.types import EditRecord, Probe
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Part, Published
from kecore.evaluate.probes import chain_probes, edit_probe, make_request, paraphrases
from kecore_datasets.shared import known, one_hop, question_and_answer

__all__ = ["CKNOWEDIT", "MLAKE", "PARALLEL"]

_ENGLISH = "en"


def _is_parallel(values: Mapping[str, Any]) -> bool:
    return _ENGLISH in values and all(isinstance(item, Mapping) and "src" in item for item in values.values())


def _consequences(fields: Fields, axis: str) -> list[Probe]:
    """Portability questions of one language."""
    return [*one_hop(fields, axis), *question_and_answer(fields, "portability", axis, "port", "port_ans")]


def _parallel(fields: Fields, language: str) -> EditRecord:
    """An edit in one language; the same questions in the other one are axes that begin with its name."""
    edited = fields.object(language)
    subject, target, truth = edited.text("subject"), edited.text("alt"), edited.text_or_none("old")
    request = make_request(edited, edited.text("src"), subject, target, truth, edited.id("case_id"))
    edit = edit_probe(request)
    locality = question_and_answer(edited, "locality", "unrelated", "loc", "loc_ans")
    portability = _consequences(edited, "one_hop")
    for name in fields.values:
        if name == language:
            continue
        other = fields.object(name)
        locality += question_and_answer(other, "locality", f"{name}_unrelated", "loc", "loc_ans")
        portability.append(other.probe("portability", "src", "alt", f"{name}_edit"))
        portability += question_and_answer(other, "portability", f"{name}_rephrase", "rephrase", "alt")
        portability += _consequences(other, f"{name}_one_hop")
    probes = (edit, *paraphrases(edit, edited.texts("rephrase")), *locality, *portability)
    return EditRecord(request, probes, labels={"category": language})


def _from_english(fields: Fields) -> EditRecord:
    """MzsRE (arXiv 2312.13179) and BMIKE-53 (arXiv 2406.17764), edited in English."""
    return _parallel(fields, _ENGLISH)


def _to_english(fields: Fields) -> EditRecord:
    """The same, edited in the file's other language."""
    others = [name for name in fields.values if name != _ENGLISH]
    if not others:
        raise DataFormatError(f"{fields.where}: there is no language beside English to edit in")
    return _parallel(fields, others[0])


PARALLEL = Layout(
    "mzsre",
    ("en",),
    "{en: {subject, src, alt, ...}, LANGUAGE: {...}}",
    {"from-english": _from_english, "to-english": _to_english},
    (
        "rephrases", "category", "portability: one_hop", "portability: LANGUAGE_edit",
        "portability: LANGUAGE_rephrase", "portability: LANGUAGE_one_hop", "locality: unrelated",
        "locality: LANGUAGE_unrelated",
    ),
    (
        Published(
            "MzsRE", "zsRE in twelve languages", "743 in each language", "none given", "github.com/Vicky-Wil/ReMaKE",
            "2312.13179",
        ),
        Published(
            "BMIKE-53", "zsRE, CounterFact and WikiFactDiff in 53 languages",
            "743, 1,031 and 784 test records in each language", "MIT", "github.com/ercong21/MultiKnow", "2406.17764",
        ),
    ),
    detect=_is_parallel,
)  # fmt: skip


def _is_mlake(values: Mapping[str, Any]) -> bool:
    return any(set(names) <= set(values) for names in (("e_prompt", "e_answer"), ("o_answer", "o_answer_aliases")))


def _mlake(fields: Fields) -> EditRecord:
    """MLaKE (arXiv 2404.04990): single-hop edits, with the same fact in the other language and multi-hop questions.

    No subject is published: the whole question is the subject. The multi-hop files name their edit by its English
    sentence; loading the folder puts those questions, in all languages, with their edits, and the questions of the
    two single-hop files together by their position, as they are published.
    """
    if "o_prompt" not in fields:
        raise DataFormatError(
            f"{fields.where}: multi-hop questions without the edit they follow from; load the folder that holds the "
            "single-hop files as well"
        )
    request = make_request(fields, fields.text("question"), None, fields.text("e_answer"), fields.text("o_answer"))
    probes = [edit_probe(request, fields.texts("e_answer_aliases"), fields.texts("o_answer_aliases"))]
    for name in fields.values:
        if name.endswith("_single_hop"):
            other = fields.object(name)
            probes.append(other.probe("portability", "question", "e_answer", axis=f"{name[:2]}_edit"))
    for number, item in enumerate(fields.objects_or_none("multi_hop")):
        answers = item.answers("e_answer") + item.answers_or_none("e_answer_aliases")
        probes += chain_probes(number, item.texts("question"), answers)
    return EditRecord(request, tuple(probes), labels=known(category=fields.text_or_none("language")))


def _merge_mlake(parts: Sequence[Part]) -> list[tuple[str, Any]]:
    """Single-hop records in English if there are any, else in the first language, with what belongs to them."""
    single = {_language(part): part.objects for part in parts if "o_prompt" in part.objects[0][1]}
    if not single:
        raise DataFormatError("none of these files holds single-hop edits (question, o_prompt, e_prompt)")
    language = _ENGLISH if _ENGLISH in single else min(single)
    chains: dict[str, list[Any]] = {}
    for part in parts:
        if "o_prompt" not in part.objects[0][1]:
            for _, value in part.objects:
                chains.setdefault(value.get("e_prompt", ""), []).append(value)
    merged: list[tuple[str, Any]] = []
    for i, (where, value) in enumerate(single[language]):
        others = {
            f"{name}_single_hop": objects[i][1]
            for name, objects in single.items()
            if name != language and len(objects) == len(single[language])
        }
        merged.append(
            (where, {**value, **others, "language": language, "multi_hop": chains.get(value["e_prompt"], [])})
        )
    return merged


def _language(part: Part) -> str:
    return part.name.rpartition("/")[2].partition("_")[0]


MLAKE = Layout(
    "mlake",
    ("question",),
    "question, o_prompt, o_answer, e_prompt, e_answer, aliases",
    _mlake,
    ("multi_hop", "target_aliases", "truth_aliases", "category", "portability: LANGUAGE_edit"),
    (
        Published(
            "MLaKE", "edits and multi-hop questions in five languages", "5,360 single-hop, 4,072 multi-hop",
            "none given", "github.com/Hi-archers/MLaKE", "2404.04990",
        ),
    ),
    detect=_is_mlake,
    merge=_merge_mlake,
)  # fmt: skip


def _cknowedit(fields: Fields) -> EditRecord:
    """CKnowEdit (arXiv 2409.05806): Chinese poems, idioms, history and riddles that models get wrong.

    No subject is published: the whole prompt is the subject.
    """
    prompt, target, truth = fields.text("prompt"), fields.text("target_new"), fields.text_or_none("target_old")
    request = make_request(fields, prompt, None, target, truth, fields.id("id"))
    edit = edit_probe(request)
    locality = [
        item.probe("locality", "prompt", "answer", axis="unrelated") for item in fields.objects_or_none("locality")
    ]
    portability = [
        item.probe("portability", "prompt", "answer", axis="one_hop") for item in fields.objects_or_none("portability")
    ]
    return EditRecord(request, (edit, *paraphrases(edit, fields.texts("rephrase")), *locality, *portability))


CKNOWEDIT = Layout(
    "cknowedit",
    ("prompt", "target_old", "target_new"),
    "prompt, target_old, target_new, rephrase, portability[{prompt, answer}], locality",
    _cknowedit,
    ("rephrases", "portability: one_hop", "locality: unrelated"),
    (
        Published(
            "CKnowEdit", "Chinese language, culture and logic", "1,854", "MIT", "hf:zjunlp/CKnowEdit", "2409.05806",
        ),
    ),
)  # fmt: skip
