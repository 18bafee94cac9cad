"""Medical facts and explanations: MedCF and MedFE."""

from __future__ import annotations

from kecore.api.types import EditRecord, Probe
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Published
from kecore.evaluate.probes import edit_probe, make_request, paraphrases
from kecore_datasets.shared import known, question_and_answer

__all__ = ["MEDLASA"]

_AXES = ("target", "mapping", "struc", "tokenSem", "topic")


def _medlasa(fields: Fields) -> EditRecord:
    """Read a record of MedCF or MedFE (arXiv 2402.18099), which ask locality in up to four ways.

    These are facts with the same old answer (``target``), of the same subject (``mapping``), near in the knowledge
    graph (``struc``) or in wording (``tokenSem``), and of the same topic (``topic``). MedFE's target is an explanation
    of the fact in the prompt, and has no old answer.
    """
    truth = fields.text_or_none("ground_truth")
    prompt, subject, target = fields.text("prompt"), fields.text("subject"), fields.text("target_new")
    request = make_request(fields, prompt, subject, target, truth, fields.id("case_id"))
    edit = edit_probe(request)
    locality: list[Probe] = []
    for axis in _AXES:
        names = (f"locality_{axis}_prompt", f"locality_{axis}_ground_truth")
        locality += question_and_answer(fields, "locality", axis, *names)
    return EditRecord(
        request,
        (edit, *paraphrases(edit, fields.texts("rephrase_prompt")), *locality),
        labels=known(category=fields.text_or_none("topic_type"), long_form="yes" if truth is None else None),
    )


MEDLASA = Layout(
    "medlasa",
    ("prompt", "subject", "target_new", "locality_tokenSem_prompt"),
    "prompt, subject, target_new, locality_tokenSem_prompt, locality_tokenSem_ground_truth, ...",
    _medlasa,
    ("rephrases", "category", "long_form", *(f"locality: {axis}" for axis in _AXES)),
    (
        Published(
            "MedCF", "facts of a medical knowledge graph made false on purpose", "2,408 train, 818 valid, 802 test",
            "none given", "github.com/quqxui/MedLaSA", "2402.18099",
        ),
        Published(
            "MedFE", "explanations of medical facts", "852 valid, 842 test; train not counted", "none given",
            "github.com/quqxui/MedLaSA", "2402.18099",
        ),
    ),
)  # fmt: skip
