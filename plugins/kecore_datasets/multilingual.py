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
    """Make the one-hop probes of one language."""
    return [*one_hop(fields, axis), *question_and_answer(fields, "portability", axis, "port", "port_ans")]


def _parallel(fields: Fields, language: str) -> EditRecord:
    """Read an edit in one language; the same questions in another are on axes that begin with its name."""
    edited = fields.object(language)
    subject, target, truth = edited.text("subject"), edited.text("alt"), edited.text_or_none("old")
    request = make_request(edited, edited.text("src"), subject, target, truth, edited.id("case_id"))
    edit = edit_probe(request)
    locality = question_and_answer(edited, "locality", "unrelated", "loc", "loc_ans")
    portability = _consequences(edited, "one_hop")
    for name in fields.values:
        if name == language:
            continue
        translation = fields.object(name)
        locality += question_and_answer(translation, "locality", f"{name}_unrelated", "loc", "loc_ans")
        portability.append(translation.probe("portability", "src", "alt", f"{name}_edit"))
        portability += question_and_answer(translation, "portability", f"{name}_rephrase", "rephrase", "alt")
        portability += _consequences(translation, f"{name}_one_hop")
    probes = (edit, *paraphrases(edit, edited.texts("rephrase")), *locality, *portability)
    return EditRecord(request, probes, labels={"category": language})


def _from_english(fields: Fields) -> EditRecord:
    """Read a record of MzsRE (arXiv 2312.13179) or BMIKE-53 (arXiv 2406.17764) that is edited in English."""
    return _parallel(fields, _ENGLISH)


def _to_english(fields: Fields) -> EditRecord:
    """Read such a record that is edited in the file's other language."""
    languages = [name for name in fields.values if name != _ENGLISH]
    if not languages:
        raise DataFormatError(f"{fields.where}: there is no language beside English to edit in")
    return _parallel(fields, languages[0])


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
    """Read a record of MLaKE (arXiv 2404.04990): an edit, the same fact in other languages, and multi-hop questions.

    No subject is published: the whole question is the subject. The multi-hop files name their edit by its English
    sentence; where the folder is loaded, those questions, in all languages, stand with their edits. Records of the
    single-hop files belong together by their position, as they are published.
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
            translation = fields.object(name)
            language = name[:2]
            probes.append(translation.probe("portability", "question", "e_answer", axis=f"{language}_edit"))
    for number, item in enumerate(fields.objects_or_none("multi_hop")):
        answers = item.answers("e_answer") + item.answers_or_none("e_answer_aliases")
        probes += chain_probes(number, item.texts("question"), answers)
    return EditRecord(request, tuple(probes), labels=known(category=fields.text_or_none("language")))


def _merge_mlake(parts: Sequence[Part]) -> list[tuple[str, Any]]:
    """Put the records of all files together: single-hop edits of one language, with what belongs to each.

    The language is English if it is among the files, else the first.
    """
    single_hop = {_language(part): part.objects for part in parts if _is_single_hop(part)}
    if not single_hop:
        raise DataFormatError("none of these files holds single-hop edits (question, o_prompt, e_prompt)")
    multi_hop: dict[str, list[Any]] = {}  # by the edit's English sentence
    for part in parts:
        if not _is_single_hop(part):
            for _, value in part.objects:
                multi_hop.setdefault(value.get("e_prompt", ""), []).append(value)
    language = _ENGLISH if _ENGLISH in single_hop else min(single_hop)
    edits = single_hop.pop(language)
    merged: list[tuple[str, Any]] = []
    for i, (where, value) in enumerate(edits):
        record = dict(value)
        for name, translations in single_hop.items():
            if len(translations) == len(edits):
                _, record[f"{name}_single_hop"] = translations[i]
        record["language"] = language
        record["multi_hop"] = multi_hop.get(value["e_prompt"], [])
        merged.append((where, record))
    return merged


def _is_single_hop(part: Part) -> bool:
    _, first_value = part.objects[0]
    return "o_prompt" in first_value


def _language(part: Part) -> str:
    """Return the language that the name of a file begins with."""
    file_name = part.name.rpartition("/")[2]
    return file_name.partition("_")[0]


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
    """Read a record of CKnowEdit (arXiv 2409.05806): Chinese poems, idioms, history and riddles.

    No subject is published: the whole prompt is the subject.
    """
    prompt, target, truth = fields.text("prompt"), fields.text("target_new"), fields.text_or_none("target_old")
    request = make_request(fields, prompt, None, target, truth, fields.id("id"))
    edit = edit_probe(request)
    locality: list[Probe] = []
    for item in fields.objects_or_none("locality"):
        locality.append(item.probe("locality", "prompt", "answer", axis="unrelated"))
    portability: list[Probe] = []
    for item in fields.objects_or_none("portability"):
        portability.append(item.probe("portability", "prompt", "answer", axis="one_hop"))
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
