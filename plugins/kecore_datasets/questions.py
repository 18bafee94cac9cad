"""Questions whose answers changed: QAEdit, WikiBigEdit, UltraEditBench, HalluEditBench."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kecore.api.types import EditRecord, EditRequest, Probe
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Published
from kecore.evaluate.probes import chain_probes, edit_probe, make_request, paraphrases
from kecore_datasets.shared import known, on_axis, question_and_answer

__all__ = ["HALLUEDITBENCH", "QAEDIT", "ULTRAEDITBENCH", "WIKIBIGEDIT"]


def _qaedit(fields: Fields) -> EditRecord:
    """Read a record of QAEdit (arXiv 2502.11177): a question of NQ, TriviaQA or SimpleQA that models get wrong."""
    prompt, subject, target = fields.text("prompt"), fields.text("subject"), fields.text("target")
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
    """Read a record of WikiBigEdit (arXiv 2503.05683): a change of Wikidata between two dumps, one file a time step."""
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


def _ultraeditbench(fields: Fields) -> EditRecord:
    """Read a record of UltraEditBench (arXiv 2505.14679): a question of Wikidata5M, asked in two ways."""
    subject, target = fields.text("subject"), fields.text("ans")
    request = make_request(fields, fields.text("prompt"), subject, target, None, fields.id("case_id"))
    edit = edit_probe(request)
    return EditRecord(
        request,
        (
            edit,
            *paraphrases(edit, fields.texts("rephrase_prompt")),
            *question_and_answer(fields, "locality", "unrelated", "loc", "loc_ans"),
        ),
    )


ULTRAEDITBENCH = Layout(
    "ultraeditbench",
    ("subject", "prompt", "ans", "loc", "loc_ans"),
    "subject, prompt, ans, rephrase_prompt, loc, loc_ans",
    _ultraeditbench,
    ("rephrases", "locality: unrelated"),
    (
        Published(
            "UltraEditBench", "questions of Wikidata5M for editing at scale", "over 2,000,000", "none given",
            "hf:XiaojieGu/UltraEditBench", "2505.14679",
        ),
    ),
)  # fmt: skip

_HOPS = range(2, 7)
_TURNS = range(1, 11)
_CHOICES = ("question", "multiple_choice_with_letters", "multiple_choice_labels")


def _is_hallueditbench(values: Mapping[str, Any]) -> bool:
    return any(name.startswith("output_") for name in values)


def _hallueditbench(fields: Fields) -> EditRecord:
    """Read a record of HalluEditBench (arXiv 2410.16251): what a model got wrong about Wikidata, one table a topic.

    Its generalisation questions other than the paraphrase, and its two- to six-hop questions, are axes of portability.
    The locality question has no published answer: the score is whether the model's own answer stays. Robustness is a
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
    """Make the request that corrects a model's answer, which the column ``output_MODEL`` holds."""
    output_columns = [name for name in fields.values if name.startswith("output_")]
    wrong_answer = fields.text_or_none(output_columns[0]) if output_columns else None  # a cell may be empty
    question, subject, target = fields.text("question"), fields.text("subject"), fields.text("object")
    return make_request(fields, question, subject, target, wrong_answer)


def _robustness(fields: Fields) -> EditRecord:
    """Read a record of HalluEditBench's robustness: the edited answer is called wrong, ten times over.

    In the published conversation (arXiv 2410.16251) the model's own replies stand between the doubts. Here the replies
    so far are those of a model that stood by the edit, so turn n asks whether it still does after n - 1 such turns.
    The conversation is one prompt, a line a turn with its reply.
    """
    request = _hallucination(fields)
    first_line = f"{request.text} {request.target}"
    doubts: list[str] = []
    for question in fields.texts("yes_question"):
        doubts.append(f'Your answer to the original question is wrong. {question} Respond with "Yes" or "No."')
    probes = [edit_probe(request)]
    for turn in _TURNS:
        for doubt in doubts:
            earlier_turns = [f"{doubt} Yes"] * (turn - 1)
            prompt = "\n".join([first_line, *earlier_turns, doubt])
            probes.append(Probe("portability", prompt, ("Yes",), axis=f"turn_{turn}"))
    labels = known(relation=fields.text_or_none("relation"), category=fields.text_or_none("topic"))
    return EditRecord(request, tuple(probes), labels=labels)


def _choices(fields: Fields) -> list[Probe]:
    """Make the probe of the multiple-choice question, where a record has one."""
    if not all(name in fields for name in _CHOICES):
        return []
    question, choices, letter = [fields.text(name) for name in _CHOICES]
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
