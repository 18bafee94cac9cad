"""zsRE as MEND published it, with the portability questions of EasyEdit."""

from __future__ import annotations

from kecore.api.types import EditRecord
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Published
from kecore.evaluate.probes import edit_probe, make_request, openings, paraphrases
from kecore_datasets.counterfact import essays
from kecore_datasets.shared import on_axis, one_hop, question_and_answer

__all__ = ["LEME_ZSRE", "ZSRE"]


def _zsre(fields: Fields) -> EditRecord:
    """Read a record of zsRE (arXiv 2110.11309); ``loc`` keeps its published wording."""
    subject, target = fields.text("subject"), fields.text("alt")
    truths = fields.answers_or_none("answers")
    truth = truths[0] if truths else None
    request = make_request(fields, fields.text("src"), subject, target, truth, fields.id("case_id"))
    edit = edit_probe(request, old_aliases=truths[1:])
    return EditRecord(
        request,
        (
            edit,
            *paraphrases(edit, fields.texts("rephrase")),
            *question_and_answer(fields, "locality", "unrelated", "loc", "loc_ans"),
            *one_hop(fields),
            *on_axis("portability", "inverse_relation", fields.texts("inverse question"), subject),
            *on_axis("portability", "subject_replace", fields.texts("alter_subject_question"), target),
        ),
    )


ZSRE = Layout(
    "zsre",
    ("subject", "src", "alt"),
    "subject, src, alt, rephrase, ...",
    _zsre,
    (
        "rephrases", "truth_aliases", "locality: unrelated", "portability: one_hop",
        "portability: inverse_relation", "portability: subject_replace",
    ),
    (
        Published(
            "zsRE", "questions of relation extraction, with paraphrases by back-translation",
            "19,086 for editing, about 163,000 for training", "MIT", "github.com/eric-mitchell/mend", "2110.11309",
        ),
        Published(
            "zsRE with portability", "zsRE with one-hop, inverse and alias questions", "1,037", "MIT",
            "github.com/zjunlp/EasyEdit", "2305.13172",
        ),
    ),
)  # fmt: skip


def _leme(fields: Fields) -> EditRecord:
    """Read a fact of LEME (arXiv 2402.09394) in zsRE's layout, with the long texts that a model is asked for."""
    record = _zsre(fields)
    return record.with_probes("generation", openings(essays(fields, record.request.subject or "")))


LEME_ZSRE = Layout(
    "leme-zsre",
    ("subject", "src", "alt", "coupled_prompts_and_properties"),
    "zsRE's fields, coupled_prompts_and_properties{subject_entity, coupled_entities}",
    _leme,
    (*ZSRE.fills, "generation_prompts"),
    (
        Published(
            "LEME zsRE", "zsRE with essays to write about subjects and entities coupled to them",
            "not stated", "MIT", "github.com/domenicrosati/longform-evaluation-model-editing", "2402.09394",
        ),
    ),
)  # fmt: skip
