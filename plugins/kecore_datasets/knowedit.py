"""KnowEdit's six parts, in four layouts."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from kecore.errors import DataFormatError
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Published, filled, make_request
from kecore.types import EditRecord

__all__ = ["CONVSENT", "KNOWEDIT", "SANITATION", "WIKIBIO"]

_SOURCE = ("MIT", "hf:zjunlp/KnowEdit", "2401.01286")
_FIELDS = {"subject", "prompt", "target_new", "ground_truth", "rephrase_prompt", "cond", "locality", "portability"}


def _is_knowedit(values: Mapping[str, Any]) -> bool:
    # kecore's own layout has the same five fields; its probes hold 'answers', KnowEdit's 'ground_truth'.
    groups = [values["locality"], values["portability"]]
    axes = [axis for group in groups if isinstance(group, Mapping) for axis in group.values()]
    probes = [probe for axis in axes if isinstance(axis, list) for probe in axis]
    if not probes:
        return set(values) <= _FIELDS
    return all(isinstance(probe, Mapping) and "ground_truth" in probe for probe in probes)


def _knowedit(fields: Fields) -> EditRecord:
    """KnowEdit's ZsRE, wiki_recent and wiki_counterfact (arXiv 2401.01286).

    Of several old answers the first is the ground truth.
    """
    truths = fields.answers_or_none("ground_truth")
    prompt, subject, target = (fields.text(name) for name in ("prompt", "subject", "target_new"))
    return EditRecord(
        make_request(fields, prompt, subject, target, truths[0] if truths else None),
        rephrases=fields.texts("rephrase_prompt"),
        locality=fields.axes("locality", "ground_truth"),
        portability=fields.axes("portability", "ground_truth"),
        truth_aliases=truths[1:],
    )


KNOWEDIT = Layout(
    "knowedit",
    ("prompt", "subject", "target_new", "locality", "portability"),
    "prompt, subject, target_new, locality{axis: [{prompt, ground_truth}]}, ...",
    _knowedit,
    (
        "rephrases", "truth_aliases", "portability: Logical_Generalization", "portability: Reasoning",
        "portability: Subject_Aliasing", "locality: Relation_Specificity", "locality: Forgetfulness",
    ),
    (
        Published("KnowEdit ZsRE", "zsRE with probes by axis", "10,000 train, 1,301 test", *_SOURCE),
        Published("KnowEdit wiki_recent", "facts added to Wikidata lately", "570 train, 1,266 test", *_SOURCE),
        Published("KnowEdit wiki_counterfact", "counterfactuals from Wikidata", "1,455 train, 885 test", *_SOURCE),
    ),
    detect=_is_knowedit,
)  # fmt: skip


def _wikibio(fields: Fields) -> EditRecord:
    """KnowEdit's WikiBio: the passage so far is the prompt, its concept the subject, ``labels`` follows.

    As EasyEdit maps it. The old (hallucinated) sentence is not published, so there is no ground truth.
    """
    return EditRecord(
        make_request(fields, fields.text("text"), fields.text("concept"), fields.text("labels")),
        locality=fields.axes("locality", "ground_truth"),
        long_form=True,
    )


WIKIBIO = Layout(
    "knowedit-wikibio",
    ("text", "labels", "concept"),
    "text, labels, concept, locality",
    _wikibio,
    ("long_form", "locality: Relation_Specificity"),
    (Published("KnowEdit WikiBio", "hallucinated biographies, corrected", "592 train, 1,392 test", *_SOURCE),),
)

_OPINION = ("What do you feel about {}?", "How do you view {}?", "What is your opinion of {}?")


def _convsent(fields: Fields) -> EditRecord:
    """KnowEdit's ConvSent: the first reply of one sentiment is the target, that of the other the old answer.

    EasyEdit draws the sentiment at random; here a digest of the entity decides, so that every run edits
    the same half towards the negative. The questions are those of SERAC (arXiv 2206.06520). Success then
    reads "prefers the reply of the new sentiment"; the paper's classifier-based score is not computed.
    """
    entity = fields.text("ent")
    replies = [fields.answers("pos"), fields.answers("neg")]
    if not all(replies):
        raise DataFormatError(f"{fields.where}: fields 'pos' and 'neg' must each hold a reply")
    if sha256(entity.encode()).digest()[0] & 1:
        replies.reverse()
    return EditRecord(
        make_request(fields, "What do you think of {}?", entity, replies[0][0], replies[1][0]),
        rephrases=tuple(question.replace("{}", entity) for question in _OPINION),
    )


CONVSENT = Layout(
    "knowedit-convsent",
    ("ent", "pos", "neg"),
    "ent, pos, neg",
    _convsent,
    ("rephrases",),
    (Published("KnowEdit ConvSent", "opinions of entities, turned round", "14,390 train, 800 test", *_SOURCE),),
)

_SANITATION = (("K_F", "K_R"), ("success", "locality"))


def _is_sanitation(values: Mapping[str, Any]) -> bool:
    return any(all(isinstance(values.get(key), list) for key in keys) for keys in _SANITATION)


def _sanitation_records(document: Fields) -> list[dict[str, Any]]:
    """One object a fact to forget, each with its share of the facts to keep (dealt out in turn)."""
    forget, keep = next(keys for keys in _SANITATION if keys[0] in document)
    facts = [fact.values for fact in document.objects(forget)]
    kept = [fact.values for fact in document.objects(keep)]
    return [{**fact, "keep": kept[i :: len(facts)]} for i, fact in enumerate(facts)]


def _sanitation(fields: Fields) -> EditRecord:
    """KnowEdit's Sanitation: the question should be refused, other questions still answered.

    The facts to keep belong to the whole set; each is asked with one of the facts to forget, so a run
    over all records asks all of them once. The test file names no subjects: there the whole question is
    the subject, which edits at its last token. The published protocol edits the train file's facts and
    asks the test file's questions.
    """
    truths = fields.answers("ground_truth")
    kept = (item.probe("question", "ground_truth") for item in fields.objects("keep"))
    subject, truth = fields.text_or_none("subject"), truths[0] if truths else None
    return EditRecord(
        make_request(fields, fields.text("question"), subject, fields.text("target_new"), truth),
        locality=filled({"unrelated": kept}),
        truth_aliases=truths[1:],
    )


SANITATION = Layout(
    "knowedit-sanitation",
    (),
    "{K_F: [...], K_R: [...]} or {success: [...], locality: [...]}",
    _sanitation,
    ("truth_aliases", "locality: unrelated"),
    (Published("KnowEdit Sanitation", "TriviaQA answers to be forgotten", "80 train, 80 test", *_SOURCE),),
    detect=_is_sanitation,
    expand=_sanitation_records,
)
