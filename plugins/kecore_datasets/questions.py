"""Questions whose answers changed: QAEdit, WikiBigEdit, HalluEditBench."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kecore.api.types import EditRecord, EditRequest, Probe
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Published
from kecore.evaluate.probes import chain_probes, edit_probe, make_request, paraphrases
from kecore_datasets.shared import known, on_axis, question_and_answer

__all__ = ["HALLUEDITBENCH", "QAEDIT", "WIKIBIGEDIT"]


def _qaedit(fields: Fields) -> EditRecord:
    """QAEdit (arXiv 2502.11177): questions of NQ, TriviaQA and SimpleQA that models get wrong."""
    prompt, subject, target = (fields.text(name) for name in ("prompt", "subject", "target"))
    request = make_request(fields, prompt, subject, target, None, fields.id("id"))
    edit = edit_probe(request)
    unrelated = [item.probe("locality", "loc", "loc_ans", "unrelated") for item in fields.objects("locality")]
    return EditRecord(
        request,
        (edit, *paraphrases(edit, fields.texts("rephrase")), *unrelated),
        labels=known(category=fields.text_or_none("source")),
    )


QAEDIT = Layout(
    "qaedit",
    ("prompt", "target", "subject", "rephrase", "locality"),
    "prompt, target, subject, rephrase, locality[{loc, loc_ans}]",
    _qaedit,
    ("rephrases", "category", "locality: unrelated"),
    (
        Published(
            "QAEdit", "questions of NQ, TriviaQA and SimpleQA that models get wrong", "19,249; 1,000 in the repository",
            "Apache-2.0", "github.com/WanliYoung/Revisit-Editing-Evaluation, hf:WenDingY/QAEdit", "2502.11177",
        ),
    ),
    detect=lambda values: isinstance(values["locality"], list),
)  # fmt: skip


def _wikibigedit(fields: Fields) -> EditRecord:
    """WikiBigEdit (arXiv 2503.05683): changes of Wikidata between two dumps, one file a time step."""
    subject, target = fields.text("subject"), fields.text("ans")
    request = make_request(fields, fields.text("update"), subject, target, None, fields.id("id"))
    edit = edit_probe(request)
    chain: tuple[Probe, ...] = ()
    if fields.texts("mhop"):
        question = fields.probe("multi_hop", "mhop", "mhop_ans")
        chain = chain_probes(0, [question.prompt], question.answers)
    return EditRecord(
        request,
        (
            edit,
            *paraphrases(edit, fields.texts("rephrase")),
            *question_and_answer(fields, "locality", "unrelated", "loc", "loc_ans"),
            *on_axis("portability", "personas", fields.texts("personas"), target),
            *chain,
        ),
        labels=known(relation=fields.text_or_none("relation"), category=fields.text_or_none("tag")),
    )


WIKIBIGEDIT = Layout(
    "wikibigedit",
    ("subject", "update", "ans", "loc", "loc_ans"),
    "subject, update, ans, rephrase, personas, mhop, mhop_ans, loc, loc_ans",
    _wikibigedit,
    ("rephrases", "relation", "category", "multi_hop", "portability: personas", "locality: unrelated"),
    (
        Published(
            "WikiBigEdit", "new and changed facts of Wikidata in eight time steps", "over 500,000 questions",
            "Apache-2.0", "hf:lukasthede/WikiBigEdit", "2503.05683",
        ),
    ),
)  # fmt: skip

_HOPS = range(2, 7)
_TURNS = range(1, 11)
_CHOICES = ("question", "multiple_choice_with_letters", "multiple_choice_labels")


def _is_hallueditbench(values: Mapping[str, Any]) -> bool:
    return any(name.startswith("output_") for name in values)


def _hallueditbench(fields: Fields) -> EditRecord:
    """HalluEditBench (arXiv 2410.16251): what a model got wrong about Wikidata, one table a topic.

    Its generalisation questions other than the paraphrase, and its two- to six-hop questions, are axes of portability.
    The locality question has no published answer: whether the model's own stays is what is scored. Robustness is a
    conversation; see :func:`_robustness`.
    """
    subject = fields.text("subject")
    request = _hallucination(fields)
    edit = edit_probe(request)
    hops: list[Probe] = []
    for n in _HOPS:
        hops += question_and_answer(fields, "portability", f"{n}_hop", f"question_{n}hop", f"answer_{n}hop")
    return EditRecord(
        request,
        (
            edit,
            *paraphrases(edit, fields.texts("paraphrased_question")),
            *question_and_answer(fields, "locality", "unrelated", "locality_question", "no answer"),
            *on_axis("portability", "yes_question", fields.texts("yes_question"), "Yes"),
            *on_axis("portability", "no_question", fields.texts("no_question"), "No"),
            *_choices(fields),
            *on_axis("portability", "inverse_relation", fields.texts("reversed_relation_question"), subject),
            *hops,
        ),
        labels=known(relation=fields.text_or_none("relation"), category=fields.text_or_none("topic")),
    )


def _hallucination(fields: Fields) -> EditRequest:
    wrong = next((name for name in fields.values if name.startswith("output_")), "output_MODEL")  # a cell may be empty
    question, subject, target = (fields.text(name) for name in ("question", "subject", "object"))
    return make_request(fields, question, subject, target, fields.text_or_none(wrong))


def _robustness(fields: Fields) -> EditRecord:
    """HalluEditBench's robustness: the edited answer is called wrong, ten times over (arXiv 2410.16251).

    The published conversation goes on with whatever the model replies. Here its replies so far are those of a model
    that has stood by the edit: turn n says whether it still does, had it done so until then. The conversation is one
    prompt, a line a turn with its reply.
    """
    request = _hallucination(fields)
    answered = f"{request.text} {request.target}"
    doubts = [
        f'Your answer to the original question is wrong. {text} Respond with "Yes" or "No."'
        for text in fields.texts("yes_question")
    ]
    probes = [edit_probe(request)]
    for n in _TURNS:
        for doubt in doubts:
            earlier = [f"{doubt} Yes"] * (n - 1)
            probes.append(Probe("portability", "\n".join([answered, *earlier, doubt]), ("Yes",), axis=f"turn_{n}"))
    labels = known(relation=fields.text_or_none("relation"), category=fields.text_or_none("topic"))
    return EditRecord(request, tuple(probes), labels=labels)


def _choices(fields: Fields) -> list[Probe]:
    if not all(name in fields for name in _CHOICES):
        return []
    question, choices, letter = (fields.text(name) for name in _CHOICES)
    return on_axis("portability", "multiple_choice", [f"{question}\n{choices}"], letter)


HALLUEDITBENCH = Layout(
    "hallueditbench",
    ("topic", "subject", "relation", "object", "question"),
    "topic, subject, relation, object, question, output_MODEL, ...",
    {"facts": _hallueditbench, "robustness": _robustness},
    (
        "rephrases", "relation", "category", "locality: unrelated", "portability: yes_question",
        "portability: no_question", "portability: multiple_choice", "portability: inverse_relation",
        *(f"portability: {n}_hop" for n in _HOPS), *(f"portability: turn_{n}" for n in _TURNS),
    ),
    (
        Published(
            "HalluEditBench", "real hallucinations of three models on 26 topics", "over 6,000", "MIT",
            "github.com/llm-editing/HalluEditBench", "2410.16251",
        ),
    ),
    detect=_is_hallueditbench,
)  # fmt: skip
