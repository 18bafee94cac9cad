"""Edits in one language and questions in others: MzsRE, BMIKE-53, MLaKE; and the Chinese CKnowEdit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kecore.api.errors import DataFormatError
from kecore.api.types import EditRecord, MultiHop, Probe
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Part, Published, filled, make_request
from kecore_datasets.shared import one_hop, question_and_answer

__all__ = ["CKNOWEDIT", "MLAKE", "PARALLEL"]

_ENGLISH = "en"


def _is_parallel(values: Mapping[str, Any]) -> bool:
    return _ENGLISH in values and all(isinstance(item, Mapping) and "src" in item for item in values.values())


def _own_probes(fields: Fields) -> dict[str, list[Probe]]:
    """Portability questions of one language."""
    return {"one_hop": [*one_hop(fields), *question_and_answer(fields, "port", "port_ans")]}


def _parallel(fields: Fields, language: str) -> EditRecord:
    """An edit in one language; the same questions in the other one are axes that begin with its name."""
    mine = fields.object(language)
    portability, locality = _own_probes(mine), {"unrelated": list(question_and_answer(mine, "loc", "loc_ans"))}
    for name in fields.values:
        if name != language:
            other = fields.object(name)
            asked = {
                "edit": [other.probe("src", "alt")],
                "rephrase": list(question_and_answer(other, "rephrase", "alt")),
            }
            portability |= {f"{name}_{axis}": probes for axis, probes in (asked | _own_probes(other)).items()}
            locality[f"{name}_unrelated"] = list(question_and_answer(other, "loc", "loc_ans"))
    subject, target, truth = mine.text("subject"), mine.text("alt"), mine.text_or_none("old")
    return EditRecord(
        make_request(mine, mine.text("src"), subject, target, truth, mine.id("case_id")),
        rephrases=mine.texts("rephrase"),
        locality=filled(locality),
        portability=filled(portability),
        category=language,
    )


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
    others = {f"{name[:2]}_edit": [fields.object(name).probe("question", "e_answer")] for name in _others(fields)}
    chains = (
        MultiHop(item.texts("question"), item.answers("e_answer") + item.answers_or_none("e_answer_aliases"))
        for item in fields.objects_or_none("multi_hop")
    )
    return EditRecord(
        make_request(fields, fields.text("question"), None, fields.text("e_answer"), fields.text("o_answer")),
        portability=filled(others),
        multi_hop=tuple(chains),
        target_aliases=fields.texts("e_answer_aliases"),
        truth_aliases=fields.texts("o_answer_aliases"),
        category=fields.text_or_none("language") or "",
    )


def _others(fields: Fields) -> list[str]:
    return [name for name in fields.values if name.endswith("_single_hop")]


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
    asked = (item.probe("prompt", "answer") for item in fields.objects_or_none("portability"))
    kept = (item.probe("prompt", "answer") for item in fields.objects_or_none("locality"))
    return EditRecord(
        make_request(fields, prompt, None, target, truth, fields.id("id")),
        rephrases=fields.texts("rephrase"),
        locality=filled({"unrelated": kept}),
        portability=filled({"one_hop": asked}),
    )


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
