"""Edits of what a thing is: TAXI moves it to another category, ConceptEdit gives a concept another definition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from kecore.api.types import EditRecord, Probe
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Published
from kecore.evaluate.probes import edit_probe, make_request, paraphrases
from kecore_datasets.shared import known

__all__ = ["CONCEPTEDIT", "TAXI"]

_COLUMNS = ("edit", "subj", "property", "query_fwd", "query_rev", "fwd_choices", "rev_choices", "answer_fwd")
_SLOT, _ANSWER = "<subj>", "<answer>"
_MEMBERSHIP = "category_membership"


def _is_taxi(values: Mapping[str, Any]) -> bool:
    return all(isinstance(values[name], Mapping) for name in _COLUMNS)


def _taxi_edits(document: Fields) -> list[dict[str, Any]]:
    """Make an object of each edit, with the rows of the published table (columns of ``{row: value}``) about it."""
    columns = {name: document.object(name).values for name in (*_COLUMNS, *document.values)}
    edits: dict[str, list[dict[str, Any]]] = {}
    for row in columns["edit"]:
        values = {name: column.get(row) for name, column in columns.items()}
        edits.setdefault(str(values["edit"]), []).append(values)
    return [{"edit": edit, "rows": rows} for edit, rows in edits.items()]


def _taxi(fields: Fields) -> EditRecord:
    """Read an edit of TAXI (arXiv 2404.15004): a subject is put into another category, with which properties change.

    Properties that change are portability, those that both categories share are locality: ``property`` asks for the
    property, ``reverse`` for the subject. The other choices of a question are the rivals of its answer. A question
    whose answer does not stand at its end cannot be asked here and is left out.

    Raises:
        DataFormatError: no row says which category the subject is put into.
    """
    rows = fields.objects("rows")
    memberships = [row for row in rows if row.text("property") == _MEMBERSHIP]
    if not memberships:
        raise fields.fail("rows", f"rows of which one has the property '{_MEMBERSHIP}'")
    membership = memberships[0]
    subject, truth = membership.text("subj"), membership.text_or_none("orig_answer_fwd")
    prompt = _forward(membership).prompt
    request = make_request(fields, prompt, subject, membership.text("answer_fwd"), truth)
    probes = [edit_probe(request)]
    for row in rows:
        if row is membership:
            continue
        for probe in (_forward(row), _reverse(row)):
            if probe.prompt:
                probes.append(probe)
    return EditRecord(request, tuple(probes), labels=known(category=membership.text_or_none("superordinate_category")))


def _forward(row: Fields) -> Probe:
    """Make the probe that asks for a property; without a prompt where the answer does not stand at the end."""
    return _choice(row, "property", _ANSWER, row.text("answer_fwd"), row.texts("fwd_choices"))


def _reverse(row: Fields) -> Probe:
    """Make the probe that asks who has a property."""
    return _choice(row, "reverse", _SLOT, row.text("subj"), row.texts("rev_choices"))


def _choice(row: Fields, axis: str, asked: str, answer: str, choices: tuple[str, ...]) -> Probe:
    query = (row.text_or_none("query_fwd" if axis == "property" else "query_rev") or "").strip()
    prompt = query.removesuffix(asked)
    if prompt == query:
        prompt = ""
    prompt = prompt.replace(_SLOT, row.text("subj")).replace(_ANSWER, row.text("answer_fwd")).strip()
    rivals = tuple(choice for choice in choices if choice != answer)
    kind = "portability" if row.flag("answer_changed") else "locality"
    return Probe(kind, prompt, (answer,), rivals, axis=axis)


TAXI = Layout(
    "taxi",
    _COLUMNS,
    "{edit: {row: value}, subj: {...}, property: {...}, query_fwd: {...}, ...}",
    _taxi,
    (
        "category", "probes", "portability: property", "portability: reverse", "locality: property",
        "locality: reverse",
    ),
    (
        Published(
            "TAXI", "things put into another category, and the properties that go with it", "976 edits", "MIT",
            "github.com/derekpowell/taxi", "2404.15004",
        ),
    ),
    detect=_is_taxi,
    expand=_taxi_edits,
)  # fmt: skip


def _conceptedit(fields: Fields) -> EditRecord:
    """Read a concept of ConceptEdit (arXiv 2403.06259), whose new definition is the target.

    Instances (does the thing still belong to the concept?) have no published answer: what counts there is how the
    model's own answer changes, which the texts beside the scores show. The paper's judge of definitions is not run.
    """
    request = make_request(fields, fields.text("prompt"), fields.text("label"), fields.text("target_new_desc"))
    edit = edit_probe(request)
    instances = [Probe("portability", prompt, axis="instance") for prompt in fields.texts("instance_prompt")]
    prompts = fields.texts("locality_prompt")
    answers: Any = fields.values.get("locality_answer")
    answer_list = cast("list[Any]", answers) if isinstance(answers, list) else [answers] * len(prompts)
    if len(answer_list) != len(prompts):
        raise fields.fail("locality_answer", f"a list as long as 'locality_prompt' ({len(prompts)})")
    locality: list[Probe] = []
    for prompt, answer in zip(prompts, answer_list, strict=True):
        texts = Fields({"locality_answer": answer}, fields.where).answers_or_none("locality_answer")
        locality.append(Probe("locality", prompt, texts, axis="unrelated"))
    return EditRecord(
        request,
        (edit, *paraphrases(edit, fields.texts("phrase_prompt")), *locality, *instances),
        labels=known(long_form="yes"),
    )


CONCEPTEDIT = Layout(
    "conceptedit",
    ("label", "prompt", "target_new_desc", "phrase_prompt"),
    "label, prompt, target_new_desc, phrase_prompt, instance_prompt, locality_prompt, locality_answer",
    _conceptedit,
    ("rephrases", "long_form", "portability: instance", "locality: unrelated"),
    (
        Published(
            "ConceptEdit", "concepts of DBpedia with another definition", "452 concepts", "CC BY-NC-SA 4.0",
            "hf:zjunlp/ConceptEdit", "2403.06259",
        ),
    ),
)  # fmt: skip
