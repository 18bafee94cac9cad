"""KnowEdit's six parts, in four layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from itertools import cycle
from typing import Any, NamedTuple, cast

from kecore.api.errors import DataFormatError
from kecore.api.types import EditRecord, Probe
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Part, Published
from kecore.evaluate.probes import edit_probe, make_request, openings, paraphrases
from kecore_datasets.shared import deal_again, deal_out, known

__all__ = ["CONVSENT", "KNOWEDIT", "SANITATION", "WIKIBIO"]

_SOURCE = ("MIT", "hf:zjunlp/KnowEdit", "2401.01286")
_FIELDS = {"subject", "prompt", "target_new", "ground_truth", "rephrase_prompt", "cond", "locality", "portability"}


def _is_knowedit(values: Mapping[str, Any]) -> bool:
    """Return whether an object is KnowEdit's and not of kecore's own layout, which has the same five fields.

    KnowEdit's probes hold ``ground_truth``, and kecore's hold ``answers``.
    """
    probes: list[Any] = []
    for group in (values["locality"], values["portability"]):
        if not isinstance(group, Mapping):
            continue
        for axis in cast("Mapping[str, Any]", group).values():
            if isinstance(axis, list):
                probes += cast("list[Any]", axis)
    if not probes:
        return set(values) <= _FIELDS
    return all(isinstance(probe, Mapping) and "ground_truth" in probe for probe in probes)


def _knowedit(fields: Fields) -> EditRecord:
    """Read a record of KnowEdit's ZsRE, wiki_recent or wiki_counterfact (arXiv 2401.01286).

    Of several old answers the first is the ground truth.
    """
    truths = fields.answers_or_none("ground_truth")
    prompt, subject, target = fields.text("prompt"), fields.text("subject"), fields.text("target_new")
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
    """Read a record of KnowEdit's WikiBio: ``labels`` is the sentence that should follow the passage so far.

    As in EasyEdit, the passage is the prompt and its concept the subject. The old (hallucinated) sentence is not
    published, so there is no ground truth.
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
    """Read a record of KnowEdit's ConvSent: the target is a reply of one sentiment, the old answer one of the other.

    Each is the first reply of its sentiment, and the further replies are its aliases. EasyEdit draws the sentiment at
    random; here a digest of the entity decides, so that every run edits the same half towards the negative. The
    questions are those of SERAC (arXiv 2206.06520).

    Args:
        fields: an entity with its replies.
        instructed: the prompt names the sentiment that is asked for.
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
    """Return the records with locality probes: the replies to the question about the next record's entity."""
    if len(records) == 1:
        return [*records]
    next_records = [*records[1:], records[0]]
    with_locality: list[EditRecord] = []
    for record, next_record in zip(records, next_records, strict=True):
        with_locality.append(record.with_probes("locality", _reply_probes(next_record)))
    return with_locality


def _reply_probes(record: EditRecord) -> list[Probe]:
    """Make a probe of each reply, of either sentiment, to the question about a record's entity."""
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

_FORM = "Question:{}\nAnswer:"


class _Lists(NamedTuple):
    """Names of the two lists in a file of Sanitation: facts to be forgotten, and facts that stay known."""

    forget: str
    keep: str


_TRAIN, _TEST = _Lists("K_F", "K_R"), _Lists("success", "locality")


def _is_sanitation(values: Mapping[str, Any]) -> bool:
    for names in (_TRAIN, _TEST):
        if isinstance(values.get(names.forget), list) and isinstance(values.get(names.keep), list):
            return True
    return False


def _sanitation_records(document: Fields) -> list[dict[str, Any]]:
    """Make an object of each fact to forget: with the number of its answer, and its share of the facts to keep."""
    names = _TRAIN if _TRAIN.forget in document else _TEST
    facts = document.objects(names.forget)
    keep = [fact.values for fact in document.objects(names.keep)]
    numbers: dict[str, int] = {}  # of the different answers, from 1
    records: list[dict[str, Any]] = []
    for fact, share in zip(facts, deal_out(keep, len(facts)), strict=True):
        number = numbers.setdefault(_first_answer(fact), len(numbers) + 1)
        records.append({**fact.values, "number": number, "keep": share})
    return records


def _first_answer(fact: Fields) -> str:
    """Return a fact's first old answer in small letters, by which facts are told apart; empty where it has none."""
    answers = fact.answers_or_none("ground_truth")
    if not answers:
        return ""
    return answers[0].casefold()


def _sanitation_files(parts: Sequence[Part]) -> list[tuple[str, Any]]:
    """Return the training file's facts to forget, each with its share of the test file's questions.

    A question whose answer is the fact's should be refused as well, and the others should still be answered.
    """
    documents: list[Fields] = []
    for part in parts:
        documents += [Fields(value, where) for where, value in part.objects]
    train_files = [document for document in documents if _TRAIN.forget in document]
    test_files = [document for document in documents if _TEST.forget in document]
    if len(train_files) != 1 or len(test_files) != 1:
        raise DataFormatError(
            "expected one training file (K_F, K_R) and one test file (success, locality), got "
            f"{', '.join(document.where for document in documents)}; name one file to edit and ask its own facts"
        )
    train, test = train_files[0], test_files[0]
    values = {_TRAIN.forget: train.values[_TRAIN.forget], _TRAIN.keep: test.values[_TEST.keep]}
    records = _sanitation_records(Fields(values, train.where))
    records_of_answer: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        record["ask"] = []
        records_of_answer.setdefault(_first_answer(Fields(record, train.where)), []).append(record)
    # Questions with one answer are dealt out in turn over the facts with that answer.
    turns = {answer: cycle(same_answer) for answer, same_answer in records_of_answer.items()}
    for question in test.objects(_TEST.forget):
        turn = turns.get(_first_answer(question))
        if turn is not None:
            next(turn)["ask"].append(question.values)
    return [(f"{train.where} record {i}", record) for i, record in enumerate(records, 1)]


def _sanitation(fields: Fields, number: int | None = None) -> EditRecord:
    """Read a record of KnowEdit's Sanitation: a question that should be refused, and others that should not.

    The facts to keep belong to the whole set; each is asked with one of the facts to forget, so a run over all records
    asks all of them once. The test file names no subjects: there the whole question is the subject, and its last token
    is where methods edit. The published protocol edits the training file's facts of one answer and asks the test
    file's questions in the form of :data:`_FORM`; kecore does so where it is given both files.

    Args:
        fields: a fact to forget.
        number: the number of the answer whose facts are edited. A record with another answer has no category.
    """
    truths = fields.answers("ground_truth")
    has_questions = "ask" in fields
    form = _FORM if has_questions else "{}"

    def question(item: Fields) -> str:
        return form.replace("{}", item.probe("locality", "question", "ground_truth").prompt)

    locality: list[Probe] = []
    for item in fields.objects("keep"):
        locality.append(Probe("locality", question(item), item.answers("ground_truth"), axis="unrelated"))
    subject = fields.text_or_none("subject")
    prompt = fields.text("question") if subject is None else question(fields)
    request = make_request(fields, prompt, subject, fields.text("target_new"), truths[0] if truths else None)
    edit = edit_probe(request, old_aliases=truths[1:])
    is_chosen = number is None or number == fields.values["number"]
    return EditRecord(
        request,
        (
            edit,
            *paraphrases(edit, map(question, fields.objects_or_none("ask"))),
            *locality,
            *openings([probe.prompt for probe in locality] if has_questions else []),
        ),
        labels=known(category=_first_answer(fields) if is_chosen else None),
    )


def _of_one_answer(records: Sequence[EditRecord]) -> list[EditRecord]:
    """Return the records of the asked-for answer, which share the locality and generation probes of all records."""
    chosen = [record for record in records if "category" in record.labels]
    return deal_again(chosen, records, "locality", "generation")


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
