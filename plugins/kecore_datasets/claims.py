"""Statements that a model calls true or false: FEVER as hypernetworks are trained on it, and memit_csk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from kecore.api.types import EditRecord, Probe
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Published
from kecore.evaluate.probes import edit_probe, make_request, paraphrases
from kecore_datasets.shared import question_and_answer

__all__ = ["FEVER", "MEMIT_CSK"]

_VERDICTS = {"SUPPORTS": "REFUTES", "REFUTES": "SUPPORTS"}


def _fever(fields: Fields) -> EditRecord:
    """Read a claim of FEVER as MEND (arXiv 2110.11309), MALMEN and RLEdit edit it: its verdict is turned round.

    The old verdict is the other one of the two, where ``ans`` gives none.
    """
    target = fields.text("alt").strip()
    truth = fields.text_or_none("ans") or _VERDICTS.get(target)
    prompt, subject = fields.text("prompt"), fields.text_or_none("subject")
    request = make_request(fields, prompt, subject, target, truth, fields.id("case_id"))
    edit = edit_probe(request)
    return EditRecord(
        request,
        (
            edit,
            *paraphrases(edit, fields.texts("equiv_prompt")),
            *question_and_answer(fields, "locality", "unrelated", "unrel_prompt", "unrel_ans"),
        ),
    )


FEVER = Layout(
    "fever",
    ("prompt", "alt", "equiv_prompt", "unrel_prompt"),
    "prompt, alt, equiv_prompt, unrel_prompt, unrel_ans",
    _fever,
    ("rephrases", "locality: unrelated"),
    (
        Published(
            "FEVER for editing", "claims of FEVER whose verdict is turned round", "not stated",
            "none given", "github.com/ChenmienTan/malmen, github.com/zhrli324/RLEdit", "2110.11309",
        ),
    ),
)  # fmt: skip

_AFFECTED = (
    "affected_neighborhood_subject", "affected_neighborhood_verb", "affected_neighborhood_object",
)  # fmt: skip
_UNAFFECTED = ("unaffected_neighborhood_subject", "unaffected_neighborhood_object")
_LABELS = {"true": "True", "1": "True", "false": "False", "0": "False"}


def _is_csk(values: Mapping[str, Any]) -> bool:
    """Return whether an object is a statement of memit_csk: with its parts, and a verdict as its label."""
    return {"subject", "verb", "object"} <= values.keys() and str(values["label"]).strip().casefold() in _LABELS


def _as_prompts(statements: Iterable[str]) -> list[str]:
    """Return statements as they are asked: with a colon, behind which the verdict stands."""
    return [f"{statement}:" for statement in statements]


def _memit_csk(fields: Fields, edited_part: str) -> EditRecord:
    """Read a statement of memit_csk (arXiv 2305.14956), whose verdict is the target.

    What the edit should reach are other wordings (paraphrases), and statements with another word in the place of
    subject, verb or object (axes of portability); a statement that is a step of the reason is true. Statements that it
    should not reach have no published verdict: what counts is that the model's own stays.

    Args:
        fields: a statement.
        edited_part: ``subject``, ``verb`` or ``object``: the part of the statement at whose last token methods edit. A
            file without parts is edited at the end of the whole statement.
    """
    verdict = _LABELS.get(fields.text("label").strip().casefold())
    if verdict is None:
        raise fields.fail("label", "True, False, 1 or 0")
    other_verdict = "False" if verdict == "True" else "True"
    (prompt,) = _as_prompts([fields.text("prompt").strip()])
    part = fields.text_or_none(edited_part)
    request = make_request(fields, prompt, part, verdict, other_verdict, fields.id("id"))
    edit = edit_probe(request)
    probes = [edit, *paraphrases(edit, _as_prompts(fields.texts("affected_paraphrase")))]
    for name in _AFFECTED:
        for statement in _as_prompts(fields.texts(name)):
            probes.append(replace(edit, kind="portability", prompt=statement, axis=name))
    for statement in _as_prompts(fields.texts("affected_reasoning")):
        probes.append(Probe("portability", statement, ("True",), ("False",), axis="affected_reasoning"))
    for name in _UNAFFECTED:
        probes += [Probe("locality", statement, axis=name) for statement in _as_prompts(fields.texts(name))]
    return EditRecord(request, tuple(probes))


MEMIT_CSK = Layout(
    "memit_csk",
    ("prompt", "label", "subject", "verb", "object"),
    "prompt, label, subject, verb, object, affected_*, unaffected_*",
    {part: partial(_memit_csk, edited_part=part) for part in ("subject", "verb", "object")},
    (
        "probes", "rephrases", *(f"portability: {name}" for name in (*_AFFECTED, "affected_reasoning")),
        *(f"locality: {name}" for name in _UNAFFECTED),
    ),
    (
        Published(
            "memit_csk", "commonsense statements that are true or false, of 20 Questions and PEP3k",
            "20Q: 379 with probes of 2,505; PEP3k: 265 of 1,531", "MIT", "github.com/anshitag/memit_csk", "2305.14956",
        ),
    ),
    detect=_is_csk,
)  # fmt: skip
