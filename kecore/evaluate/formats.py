"""The layouts in which the field publishes its data sets, and kecore's own.

A layout is one :class:`Layout` in :data:`LAYOUTS`: how to recognise an object by its fields, and how to
turn it into an :class:`~kecore.types.EditRecord`. To add a layout, write the two functions and add one
entry; order matters, from the most specific fields to the most general.

Axis names of portability and locality are kept where the data set names them (``Reasoning``,
``Relation_Specificity``, ...), else: ``one_hop``, ``inverse_relation``, ``subject_replace``;
``distracting``, ``other_attribution``, ``unrelated``, ``neighbourhood``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from kecore.errors import DataFormatError, RequestError
from kecore.evaluate.fields import Fields
from kecore.types import EditRecord, EditRequest, Probe

__all__ = ["LAYOUTS", "Layout", "record_to_json"]


@dataclass(frozen=True, slots=True)
class Layout:
    """One published layout.

    Args:
        name: what users pass as ``format``.
        describes: the fields that mark it, for messages.
        detect: whether an object is of this layout.
        parse: makes a record; raises DataFormatError or RequestError.
        strict: one bad record refuses the whole file, and ids must be unique.
        expand: for a layout whose file is one object: the objects of its records.
    """

    name: str
    describes: str
    detect: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Fields], EditRecord]
    strict: bool = False
    expand: Callable[[Fields], list[dict[str, Any]]] | None = None


def _request(
    fields: Fields, prompt: str, subject: str, target: str, truth: str | None = None, id: str = ""
) -> EditRequest:
    """A request whose subject is spelt as in the prompt, should only the case differ."""
    if "{}" not in prompt and subject.strip() and subject.strip() not in prompt:
        same = re.findall(re.escape(subject.strip()), prompt, flags=re.IGNORECASE)
        subject = same[-1] if same else subject
    try:
        return EditRequest(prompt, subject, target, truth, id)
    except RequestError as error:
        raise DataFormatError(f"{fields.where}: {error}") from None


def _has(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda values: all(name in values for name in names)


def _filled(axes: Mapping[str, Iterable[Probe]]) -> dict[str, tuple[Probe, ...]]:
    return {axis: found for axis, probes in axes.items() if (found := tuple(probes))}


def _one_hop(fields: Fields) -> Iterable[Probe]:
    """EasyEdit's one-hop portability question, in zsRE and CounterFact-plus alike."""
    if "portability" in fields:
        question = fields.object("portability")
        yield Probe(question.text("New Question"), (question.text("New Answer"),))


def _is_counterfact(values: Mapping[str, Any]) -> bool:
    return isinstance(values.get("requested_rewrite"), Mapping)


def _counterfact(fields: Fields) -> EditRecord:
    """CounterFact (arXiv 2202.05262) with the extras of CounterFact-plus (arXiv 2305.13172)."""
    rewrite = fields.object("requested_rewrite")
    prompt, subject = rewrite.text("prompt"), rewrite.text("subject")
    target = rewrite.object("target_new").text("str")
    truth = rewrite.object("target_true").text("str")
    request = _request(fields, prompt, subject, target, truth, str(fields.values["case_id"]))
    replaced: list[Probe] = []
    if "alternative_subject" in fields:
        text = request.prompt.replace("{}", fields.text("alternative_subject"))
        replaced.append(Probe(text, (target,)))
    other: list[Probe] = []
    if "unrelated_relation" in fields:
        relation = fields.object("unrelated_relation")
        other.append(Probe(relation.text("question"), relation.answers("object")))
    distracting = fields.texts("distracting_neighborhood_prompts")
    return EditRecord(
        request,
        rephrases=fields.texts("paraphrase_prompts"),
        neighbourhood=fields.texts("neighborhood_prompts"),
        locality=_filled({"distracting": (Probe(text, (truth,)) for text in distracting), "other_attribution": other}),
        portability=_filled({"one_hop": _one_hop(fields), "subject_replace": replaced}),
        generation_prompts=fields.texts("generation_prompts"),
    )


def _flat(fields: Fields) -> EditRecord:
    """EasyEdit's flat layout: CounterFact, and the hallucination and temporal sets of WISE.

    The locality prompt is asked as locality, as EasyEdit does. Where its answer is the edit's old answer
    (all of CounterFact) it is a neighbour in CounterFact's sense too.

    The published ``rephrase_prompt`` is often no paraphrase: of the 5,109 cases we could hold against
    CounterFact's original layout, 4,266 have one of its generation prompts there ("People in Lyon's twin
    city speak the language of" for an edit of the twin city). Paraphrase scores on these files are
    therefore not CounterFact's PS; use the original layout for that.
    """
    truth = fields.text_or_none("ground_truth")
    prompt, answers = fields.text("locality_prompt"), fields.answers("locality_ground_truth")
    id = str(fields.values.get("case_id", ""))
    request = _request(fields, fields.text("prompt"), fields.text("subject"), fields.text("target_new"), truth, id)
    return EditRecord(
        request,
        rephrases=fields.texts("rephrase_prompt") + fields.texts("ood_rephrase"),
        neighbourhood=(prompt,) if truth is not None and answers == (truth,) else (),
        locality={"neighbourhood": (Probe(prompt, answers),)},
    )


def _zsre(fields: Fields) -> EditRecord:
    """The zsRE set as MEND published it (arXiv 2110.11309); ``loc`` keeps its published wording."""
    subject, target = fields.text("subject"), fields.text("alt")
    truths = fields.answers("answers") if "answers" in fields else ()
    id = str(fields.values.get("case_id", ""))
    request = _request(fields, fields.text("src"), subject, target, truths[0] if truths else None, id)
    unrelated = [Probe(fields.text("loc"), fields.answers("loc_ans"))] if "loc" in fields else []
    inverse = fields.texts("inverse question")
    replaced = fields.texts("alter_subject_question")
    return EditRecord(
        request,
        rephrases=fields.texts("rephrase"),
        locality=_filled({"unrelated": unrelated}),
        portability=_filled(
            {
                "one_hop": _one_hop(fields),
                "inverse_relation": (Probe(text, (subject,)) for text in inverse),
                "subject_replace": (Probe(text, (target,)) for text in replaced),
            }
        ),
    )


def _is_knowedit(values: Mapping[str, Any]) -> bool:
    if not _has("prompt", "subject", "target_new", "locality", "portability")(values):
        return False
    # kecore's own layout has the same five fields; its probes hold 'answers', KnowEdit's 'ground_truth'.
    groups = [values["locality"], values["portability"]]
    probes = [p for g in groups if isinstance(g, Mapping) for axis in g.values() for p in axis]
    return bool(probes) and all(isinstance(p, Mapping) and "ground_truth" in p for p in probes)


def _knowedit(fields: Fields) -> EditRecord:
    """KnowEdit's ZsRE, wiki_recent and wiki_counterfact (arXiv 2401.01286).

    Of several old answers the first is the ground truth.
    """
    truths = fields.answers("ground_truth") if "ground_truth" in fields else ()
    return EditRecord(
        _request(
            fields,
            fields.text("prompt"),
            fields.text("subject"),
            fields.text("target_new"),
            truths[0] if truths else None,
        ),
        rephrases=fields.texts("rephrase_prompt"),
        locality=fields.axes("locality", "ground_truth"),
        portability=fields.axes("portability", "ground_truth"),
    )


def _wikibio(fields: Fields) -> EditRecord:
    """KnowEdit's WikiBio: the passage so far is the prompt, its concept the subject, ``labels`` follows.

    As EasyEdit maps it. The old (hallucinated) sentence is not published, so there is no ground truth.
    """
    return EditRecord(
        _request(fields, fields.text("text"), fields.text("concept"), fields.text("labels")),
        locality=fields.axes("locality", "ground_truth"),
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
        _request(fields, "What do you think of {}?", entity, replies[0][0], replies[1][0]),
        rephrases=tuple(question.replace("{}", entity) for question in _OPINION),
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
    question = fields.text("question")
    subject = fields.text_or_none("subject") or question
    truths = fields.answers("ground_truth")
    kept = (Probe(item.text("question"), item.answers("ground_truth")) for item in fields.objects("keep"))
    return EditRecord(
        _request(fields, question, subject, fields.text("target_new"), truths[0] if truths else None),
        locality=_filled({"unrelated": kept}),
    )


def _is_qaedit(values: Mapping[str, Any]) -> bool:
    return _has("prompt", "target", "subject", "rephrase")(values) and isinstance(values.get("locality"), list)


def _qaedit(fields: Fields) -> EditRecord:
    """QAEdit (arXiv 2502.11177): questions of NQ, TriviaQA and SimpleQA that models get wrong."""
    kept = (Probe(item.text("loc"), item.answers("loc_ans")) for item in fields.objects("locality"))
    id = str(fields.values.get("id", ""))
    return EditRecord(
        _request(fields, fields.text("prompt"), fields.text("subject"), fields.text("target"), None, id),
        rephrases=fields.texts("rephrase"),
        locality=_filled({"unrelated": kept}),
    )


_OWN = (
    "id",
    "prompt",
    "subject",
    "target",
    "target_new",
    "ground_truth",
    "rephrases",
    "neighbourhood",
    "locality",
    "portability",
    "generation_prompts",
    "source",
)


def _is_own(values: Mapping[str, Any]) -> bool:
    return _has("prompt", "subject")(values) and ("target" in values or "target_new" in values)


def _own(fields: Fields) -> EditRecord:
    """The layout of kecore; an unknown field is an error, since a misspelt one would silently drop probes."""
    unknown = sorted(set(fields.values) - set(_OWN))
    if unknown:
        raise DataFormatError(f"{fields.where}: unknown field '{unknown[0]}'; known fields: {', '.join(_OWN)}")
    target = fields.text("target_new" if "target_new" in fields else "target")
    truth, id = fields.text_or_none("ground_truth"), str(fields.values.get("id", ""))
    return EditRecord(
        _request(fields, fields.text("prompt"), fields.text("subject"), target, truth, id),
        rephrases=fields.texts("rephrases"),
        neighbourhood=fields.texts("neighbourhood"),
        locality=fields.axes("locality", "answers"),
        portability=fields.axes("portability", "answers"),
        generation_prompts=fields.texts("generation_prompts"),
        source=fields.text_or_none("source") or "",
    )


def record_to_json(record: EditRecord) -> dict[str, Any]:
    """A record in kecore's own layout, one line of a JSONL file; empty fields are left out.

    Examples:
        >>> record_to_json(EditRecord(EditRequest("{} is in", "Rome", "Gaul", id="1")))
        {'prompt': '{} is in', 'subject': 'Rome', 'target': 'Gaul', 'id': '1'}
    """

    def axes(groups: Mapping[str, tuple[Probe, ...]]) -> dict[str, list[dict[str, Any]]]:
        return {
            axis: [{"prompt": probe.prompt, "answers": list(probe.answers)} for probe in probes]
            for axis, probes in groups.items()
        }

    values: dict[str, Any] = {
        **record.request.to_json(),
        "rephrases": list(record.rephrases),
        "neighbourhood": list(record.neighbourhood),
        "locality": axes(record.locality),
        "portability": axes(record.portability),
        "generation_prompts": list(record.generation_prompts),
        "source": record.source,
    }
    return {name: value for name, value in values.items() if value}


LAYOUTS: tuple[Layout, ...] = (
    Layout("counterfact", "case_id, requested_rewrite{...}", _is_counterfact, _counterfact),
    Layout("zsre", "subject, src, alt, rephrase, ...", _has("subject", "src", "alt"), _zsre),
    Layout(
        "easyedit",
        "prompt, subject, target_new, locality_prompt, ...",
        _has("prompt", "subject", "target_new", "locality_prompt"),
        _flat,
    ),
    Layout(
        "knowedit",
        "prompt, subject, target_new, locality{axis: [{prompt, ground_truth}]}, ...",
        _is_knowedit,
        _knowedit,
    ),
    Layout("knowedit-wikibio", "text, labels, concept, locality", _has("text", "labels", "concept"), _wikibio),
    Layout("knowedit-convsent", "ent, pos, neg", _has("ent", "pos", "neg"), _convsent),
    Layout(
        "knowedit-sanitation",
        "{K_F: [...], K_R: [...]} or {success: [...], locality: [...]}",
        _is_sanitation,
        _sanitation,
        expand=_sanitation_records,
    ),
    Layout("qaedit", "prompt, target, subject, rephrase, locality[{loc, loc_ans}]", _is_qaedit, _qaedit),
    Layout("kecore", "prompt, subject, target (or target_new), ...", _is_own, _own, strict=True),
)
"""Every layout that :func:`kecore.evaluate.load_records` knows, most specific first."""
