"""KnowEdit's six parts, in four layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from itertools import cycle
from typing import Any

from kecore.api.errors import DataFormatError
from kecore.api.types import EditRecord, Probe
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Part, Published
from kecore.evaluate.probes import edit_probe, make_request, openings, paraphrases
from kecore_datasets.shared import known

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
    request = make_request(fields, prompt, subject, target, truths[0] if truths else None)
    edit = edit_probe(request, old_aliases=truths[1:])
    return EditRecord(
        request,
        (
            edit,
            *paraphrases(edit, fields.texts("rephrase_prompt")),
            *fields.axes("locality", "locality", "ground_truth"),
            *fields.axes("portability", "portability", "ground_truth"),
        ),
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
    request = make_request(fields, fields.text("text"), fields.text("concept"), fields.text("labels"))
    locality = fields.axes("locality", "locality", "ground_truth")
    return EditRecord(request, (edit_probe(request), *locality), labels=known(long_form="yes"))


WIKIBIO = Layout(
    "knowedit-wikibio",
    ("text", "labels", "concept"),
    "text, labels, concept, locality",
    _wikibio,
    ("long_form", "locality: Relation_Specificity"),
    (Published("KnowEdit WikiBio", "hallucinated biographies, corrected", "592 train, 1,392 test", *_SOURCE),),
)

_EDITED = "What do you think of {}?"
_OPINION = ("What do you feel about {}?", "How do you view {}?", "What is your opinion of {}?")


def _convsent(fields: Fields, instructed: bool = False) -> EditRecord:
    """KnowEdit's ConvSent: the first reply of one sentiment is the target, that of the other the old answer.

    The other replies of either sentiment are the aliases. EasyEdit draws the sentiment at random; here a digest of
    the entity decides, so that every run edits the same half towards the negative. The questions are those of SERAC
    (arXiv 2206.06520).
    """
    entity = fields.text("ent")
    replies = {"positively": fields.answers("pos"), "negatively": fields.answers("neg")}
    if not all(replies.values()):
        raise DataFormatError(f"{fields.where}: fields 'pos' and 'neg' must each hold a reply")
    new, old = "positively", "negatively"
    if sha256(entity.encode()).digest()[0] % 2 == 1:
        new, old = old, new
    prompt = f"From the sentiment dataset, answer {_EDITED} {new}." if instructed else _EDITED
    questions = [question.replace("{}", entity) for question in _OPINION]
    request = make_request(fields, prompt, entity, replies[new][0], replies[old][0])
    edit = edit_probe(request, replies[new][1:], replies[old][1:])
    return EditRecord(request, (edit, *paraphrases(edit, questions), *openings(questions[:1])))


def _with_replies_of_the_next(records: Sequence[EditRecord]) -> list[EditRecord]:
    """Return the records with what must stay: all replies to the question about the next record's entity."""
    if len(records) == 1:
        return [*records]
    following = [*records[1:], records[0]]
    return [record.with_probes("locality", _replies(other)) for record, other in zip(records, following, strict=True)]


def _replies(record: EditRecord) -> list[Probe]:
    """The question about a record's entity, once with each reply of either sentiment."""
    question = record.probes_of("paraphrase")[0]
    replies = (*question.answers, *question.rivals)
    return [Probe("locality", question.prompt, (reply,), axis="other_topic") for reply in replies]


CONVSENT = Layout(
    "knowedit-convsent",
    ("ent", "pos", "neg"),
    "ent, pos, neg",
    {"plain": _convsent, "instructed": partial(_convsent, instructed=True)},
    ("rephrases", "generation_prompts", "target_aliases", "truth_aliases", "locality: other_topic"),
    (Published("KnowEdit ConvSent", "opinions of entities, turned round", "14,390 train, 800 test", *_SOURCE),),
    finish={"plain": _with_replies_of_the_next, "instructed": _with_replies_of_the_next},
)

_SANITATION = (("K_F", "K_R"), ("success", "locality"))
_FORM = "Question:{}\nAnswer:"


def _is_sanitation(values: Mapping[str, Any]) -> bool:
    return any(all(isinstance(values.get(key), list) for key in keys) for keys in _SANITATION)


def _sanitation_records(document: Fields) -> list[dict[str, Any]]:
    """One object a fact to forget, each with its share of the facts to keep (dealt out in turn)."""
    forget, keep = next(keys for keys in _SANITATION if keys[0] in document)
    facts, kept = document.objects(forget), [fact.values for fact in document.objects(keep)]
    numbers = {answer: i for i, answer in enumerate(dict.fromkeys(map(_answer, facts)), 1)}
    return [
        {**fact.values, "number": numbers[_answer(fact)], "keep": kept[i :: len(facts)]} for i, fact in enumerate(facts)
    ]


def _answer(fact: Fields) -> str:
    return "".join(fact.answers_or_none("ground_truth")[:1]).casefold()


def _sanitation_files(parts: Sequence[Part]) -> list[tuple[str, Any]]:
    """The training file's facts to forget, each with its share of the test file's questions.

    Those whose answer is the fact's should be refused as well, the others still be answered.
    """
    documents = [Fields(value, where) for part in parts for where, value in part.objects]
    train, test = ([document for document in documents if forget in document] for forget, _ in _SANITATION)
    if len(train) != 1 or len(test) != 1:
        raise DataFormatError(
            "expected one training file (K_F, K_R) and one test file (success, locality), got "
            f"{', '.join(document.where for document in documents)}; name one file to edit and ask its own facts"
        )
    values = {"K_F": train[0].values["K_F"], "K_R": test[0].values["locality"]}
    records = _sanitation_records(Fields(values, train[0].where))
    alike: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        record["ask"] = []
        alike.setdefault(_answer(Fields(record, train[0].where)), []).append(record)
    turns = {answer: cycle(same) for answer, same in alike.items()}
    for question in test[0].objects("success"):
        if turn := turns.get(_answer(question)):
            next(turn)["ask"].append(question.values)
    return [(f"{train[0].where} record {i}", record) for i, record in enumerate(records, 1)]


def _sanitation(fields: Fields, number: int | None = None) -> EditRecord:
    """KnowEdit's Sanitation: the question should be refused, other questions still answered.

    The facts to keep belong to the whole set; each is asked with one of the facts to forget, so a run over all records
    asks all of them once. The test file names no subjects: there the whole question is the subject, which edits at its
    last token. The published protocol edits the training file's facts of one answer and asks the test file's
    questions, in the form of :data:`_FORM`; so it is where both files are read.

    Args:
        fields: a fact to forget.
        number: of the answer whose facts are edited; the category is empty where it is another one.
    """
    truths = fields.answers("ground_truth")
    form = _FORM if "ask" in fields else "{}"

    def question(item: Fields) -> str:
        return form.replace("{}", item.probe("locality", "question", "ground_truth").prompt)

    locality = [
        Probe("locality", question(item), item.answers("ground_truth"), axis="unrelated")
        for item in fields.objects("keep")
    ]
    subject, truth = fields.text_or_none("subject"), truths[0] if truths else None
    prompt = fields.text("question") if subject is None else question(fields)
    request = make_request(fields, prompt, subject, fields.text("target_new"), truth)
    edit = edit_probe(request, old_aliases=truths[1:])
    is_chosen = number is None or number == fields.values["number"]
    return EditRecord(
        request,
        (
            edit,
            *paraphrases(edit, map(question, fields.objects_or_none("ask"))),
            *locality,
            *openings([probe.prompt for probe in locality] if "ask" in fields else []),
        ),
        labels=known(category=_answer(fields) if is_chosen else None),
    )


def _of_one_answer(records: Sequence[EditRecord]) -> list[EditRecord]:
    """Return the records of the asked-for answer, which share everything that is to be kept."""
    chosen = [record for record in records if "category" in record.labels]
    locality = [probe for record in records for probe in record.probes_of("locality")]
    generation = [probe for record in records for probe in record.probes_of("generation")]
    shared: list[EditRecord] = []
    for i, record in enumerate(chosen):
        share = record.with_probes("locality", locality[i :: len(chosen)])
        shared.append(share.with_probes("generation", generation[i :: len(chosen)]))
    return shared


SANITATION = Layout(
    "knowedit-sanitation",
    (),
    "{K_F: [...], K_R: [...]} or {success: [...], locality: [...]}",
    {"every": _sanitation, "answer-N": _sanitation},
    ("rephrases", "truth_aliases", "generation_prompts", "category", "locality: unrelated"),
    (Published("KnowEdit Sanitation", "TriviaQA answers to be forgotten", "80 train, 80 test", *_SOURCE),),
    detect=_is_sanitation,
    expand=_sanitation_records,
    merge=_sanitation_files,
    finish={"answer-N": _of_one_answer},
)
