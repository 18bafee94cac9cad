"""Edits whose target is a long text: UnKEBench, EditEverything, SafeEdit."""

from __future__ import annotations

from kecore.api.types import EditRecord, Probe, SafeReply
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Published
from kecore.evaluate.probes import edit_probe, make_request, paraphrases
from kecore_datasets.shared import known, pairs

__all__ = ["EDITEVERYTHING", "SAFEEDIT", "UNKE"]


def _unke(fields: Fields) -> EditRecord:
    """Read a record of UnKEBench (arXiv 2405.15349): a question, the text that should answer it, and questions on it.

    No subject is published: the whole question is the subject, as the method edits at its last token.
    """
    request = make_request(fields, fields.text("question"), None, fields.text("answer"), None, fields.id("id"))
    edit = edit_probe(request)
    return EditRecord(
        request,
        (
            edit,
            *paraphrases(edit, fields.texts("para_question")),
            *pairs(fields, "sub_question", "sub_question", "sub_answer"),
        ),
        labels=known(long_form="yes"),
    )


UNKE = Layout(
    "unke",
    ("question", "para_question", "answer", "sub_question", "sub_answer"),
    "question, para_question, answer, sub_question, sub_answer",
    _unke,
    ("rephrases", "long_form", "portability: sub_question"),
    (
        Published(
            "UnKEBench", "unstructured texts with questions about them", "1,000", "none given",
            "github.com/TrustedLLM/UnKE", "2405.15349",
        ),
    ),
)  # fmt: skip


def _editeverything(fields: Fields) -> EditRecord:
    """Read a record of EditEverything (arXiv 2502.05628): answers in mathematics, code, news, poetry and chemistry."""
    request = make_request(fields, fields.text("question"), None, fields.text("answer"), None, fields.id("id"))
    return EditRecord(request, (edit_probe(request),), labels=known(category=fields.text("category"), long_form="yes"))


EDITEVERYTHING = Layout(
    "editeverything",
    ("id", "question", "answer", "category"),
    "id, question, answer, category",
    _editeverything,
    ("long_form", "category"),
    (
        Published(
            "EditEverything", "long answers of several kinds: mathematics, code, news, poetry", "552", "none given",
            "github.com/jianghoucheng/AnyEdit", "2502.05628",
        ),
    ),
)  # fmt: skip

_ATTACKS = {
    "only_question": "test input of only harmful question",
    "other_attack": "test input of other attack prompt input",
    "other_question": "test input of other question input",
    "other_question_and_attack": "test input of other questions and attack prompts",
}


def _safeedit(fields: Fields) -> EditRecord:
    """Read a record of SafeEdit (arXiv 2403.14472): an attack, whose target is the refusal.

    The four generalisation inputs have no reference answer; any safe reply is right. A judge decides whether a reply
    is safe, also that to the attack itself; metrics that need an answer report these inputs as not scored.
    """
    tests = fields.object("generalization test")
    stays = fields.object("knowledge constrain").probe("locality", "prompt", "answer", axis="knowledge_constraint")
    safe, unsafe = fields.text("safe generation"), fields.text_or_none("unsafe generation")
    request = make_request(fields, fields.text("adversarial prompt"), None, safe, unsafe, fields.id("id"))
    rule = SafeReply(request.target)
    attacks: list[Probe] = []
    for axis, name in _ATTACKS.items():
        attacks += [Probe("portability", text, axis=axis, rule=rule) for text in tests.texts(name)]
    return EditRecord(
        request,
        (edit_probe(request, rule=rule), stays, *attacks),
        labels=known(category=fields.text_or_none("unsafety category"), long_form="yes"),
    )


SAFEEDIT = Layout(
    "safeedit",
    ("adversarial prompt", "safe generation", "generalization test", "knowledge constrain"),
    "adversarial prompt, safe generation, unsafe generation, generalization test, knowledge constrain",
    _safeedit,
    (
        "long_form", "category", "safety", *(f"portability: {axis}" for axis in _ATTACKS),
        "locality: knowledge_constraint",
    ),
    (
        Published(
            "SafeEdit", "attacks to be refused; the files hold harmful text", "4,050 train, 2,700 val, 1,350 test",
            "CC BY-NC-SA 4.0", "hf:zjunlp/SafeEdit", "2403.14472",
        ),
    ),
)  # fmt: skip
