"""zsRE as MEND published it, with the portability questions of EasyEdit."""

from __future__ import annotations

from kecore.api.types import EditRecord, Probe
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Published, filled, make_request
from kecore_datasets.shared import one_hop, question_and_answer

__all__ = ["ZSRE"]


def _zsre(fields: Fields) -> EditRecord:
    """The zsRE set (arXiv 2110.11309); ``loc`` keeps its published wording."""
    subject, target = fields.text("subject"), fields.text("alt")
    truths = fields.answers_or_none("answers")
    truth = truths[0] if truths else None
    inverse = fields.texts("inverse question")
    replaced = fields.texts("alter_subject_question")
    return EditRecord(
        make_request(fields, fields.text("src"), subject, target, truth, fields.id("case_id")),
        rephrases=fields.texts("rephrase"),
        locality=filled({"unrelated": question_and_answer(fields, "loc", "loc_ans")}),
        portability=filled(
            {
                "one_hop": one_hop(fields),
                "inverse_relation": (Probe(text, (subject,)) for text in inverse),
                "subject_replace": (Probe(text, (target,)) for text in replaced),
            }
        ),
        truth_aliases=truths[1:],
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
