"""Chains of facts: MQuAKE and its remastered form, and AKEW, which gives each fact as a text as well."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from kecore.api.errors import DataFormatError
from kecore.api.types import EditRecord, EditRequest, Probe
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Published
from kecore.evaluate.matching import normalise
from kecore.evaluate.probes import (
    Chain,
    chain_probes,
    chains_of,
    edit_probe,
    make_request,
    make_test,
    paraphrases,
)
from kecore_datasets.counterfact import counterfact
from kecore_datasets.shared import known

__all__ = ["AKEW", "MQUAKE", "asked_apart", "masked"]


def _hops(fields: Fields, name: str) -> tuple[Probe, ...]:
    """Make probes of the single facts of a chain; the first answer is the one that the chain goes through."""
    hops: list[Probe] = []
    for hop in fields.objects_or_none(name):
        answers = hop.answers("answer") + hop.answers_or_none("answer_alias")
        hops.append(Probe("hop", hop.text("question"), answers))
    return tuple(hops)


def _object(rewrite: Fields, name: str) -> str:
    """Read the object of a fact: ``{"str": ...}``, or flat as the Hugging Face hub's tables have it."""
    if f"{name}_str" in rewrite:
        return rewrite.text(f"{name}_str")
    return rewrite.object(name).text("str")


def _request(rewrite: Fields, id: str = "") -> EditRequest:
    """Make the request of one edit of a case."""
    prompt, subject = rewrite.text("prompt"), rewrite.text("subject")
    return make_request(rewrite, prompt, subject, _object(rewrite, "target_new"), _object(rewrite, "target_true"), id)


def _chain(fields: Fields) -> tuple[Probe, ...]:
    """Make the probes of a case's question over several facts."""
    return chain_probes(
        0,
        fields.texts("questions"),
        fields.answers("new_answer") + fields.answers_or_none("new_answer_alias"),
        fields.answers("answer") + fields.answers_or_none("answer_alias"),
        hops=_hops(fields, "new_single_hops"),
        old_hops=_hops(fields, "single_hops"),
    )


def _is_mquake(values: Mapping[str, Any]) -> bool:
    rewrites: Any = values["requested_rewrite"]
    return isinstance(rewrites, list) and not _has_texts(rewrites)


def _has_texts(rewrites: list[Any]) -> bool:
    return any(isinstance(rewrite, Mapping) and "fact_new_uns" in rewrite for rewrite in rewrites)


def _mquake(fields: Fields) -> EditRecord:
    """Read a case of MQuAKE (arXiv 2305.14795): all its edits together, then the question that chains them.

    The first edit's own question is its rephrase; those of the other edits are among the hops. Aliases of the first
    edit's new and old object are those of the hop that asks for it. The remastered form says for which numbers of
    edits a case is among the edited ones; those stand in the label ``category`` as ``edited: 1000 3000``.
    """
    first, *further = fields.objects("requested_rewrite")
    question = first.texts("question")
    request = _request(first, fields.id("case_id"))
    edit = edit_probe(
        request,
        _aliases(_hops(fields, "new_single_hops"), question, _object(first, "target_new")),
        _aliases(_hops(fields, "single_hops"), question, _object(first, "target_true")),
    )
    record = EditRecord(
        request,
        (edit, *paraphrases(edit, question), *_chain(fields)),
        joint=tuple(map(_request, further)),
        labels=known(relation=first.text_or_none("relation_id"), category=_edited_at(fields)),
    )
    return record.with_id(request.id)


def _aliases(hops: tuple[Probe, ...], question: tuple[str, ...], answer: str) -> tuple[str, ...]:
    """Return other names of an edit's object: those of the hop with the edit's question, else with its answer."""
    wordings = set(map(normalise, question))
    matching = [hop for hop in hops if normalise(hop.prompt) in wordings]
    if not matching:
        matching = [hop for hop in hops if answer in hop.answers]
    if not matching:
        return ()
    return tuple(name for name in matching[0].answers if name != answer)


def _split(fields: Fields) -> Fields | None:
    """Return a case's labels in the remastered form, such as ``edited`` and ``test_unedited``, by number of edits."""
    name = "split" if "split" in fields else "6334_split"
    if name not in fields:
        return None
    return fields.object(name)


def _role(labels: Fields, number: str) -> str | None:
    """Return whether a case is ``edited`` or ``unedited`` at a number of edits, None where it is neither."""
    words: set[str] = set()
    for label in labels.texts(number):
        words.update(label.split("_"))
    for role in ("edited", "unedited"):
        if role in words:
            return role
    return None


def _edited_at(fields: Fields) -> str | None:
    """Return in words at which numbers of edits a case is edited; None where the data set does not say."""
    labels = _split(fields)
    if labels is None:
        return None
    numbers = [number for number in labels.values if _role(labels, number) == "edited"]
    if not numbers:
        return "unedited"
    ascending = sorted(numbers, key=lambda number: (len(number), number))
    return f"edited: {' '.join(ascending)}"


def _at(fields: Fields, edits: int) -> EditRecord:
    """Read a case of MQuAKE-Remastered at one of its numbers of edits; its category says if it is edited there."""
    labels, number = _split(fields), str(edits)
    if labels is None:
        raise fields.fail("split", "what MQuAKE-Remastered says of a case at each number of edits")
    if number not in labels.values:
        raise DataFormatError(f"{labels.where}: no {number} edits here, only {', '.join(labels.values)}")
    record = _mquake(fields)
    other_labels = {name: text for name, text in record.labels.items() if name != "category"}
    return replace(record, labels=other_labels | known(category=_role(labels, number)))


def masked(records: Sequence[EditRecord]) -> list[EditRecord]:
    """Return cases that are edited together, without the chains that the edits of another case contradict.

    MQuAKE-Remastered (Zhong et al., ICLR 2025) masks, for each case, the edits of other cases that say something else
    about a fact of its chain (``get_edits_without_contamination`` of its code). Where all edits are in one model they
    cannot be masked, so here the question is left out instead. A fact is known by its own question, which MQuAKE
    writes alike for the same subject and relation.

    Args:
        records: cases of this layout.
    """
    statements = _statements(records)
    return [_without_contradicted_chains(record, statements) for record in records]


def _without_contradicted_chains(record: EditRecord, statements: Statements) -> EditRecord:
    dropped: list[Probe] = []
    for chain in chains_of(record):
        if not _holds(chain.hops, statements, record.request.id):
            dropped += chain.probes
    return replace(record, probes=tuple(probe for probe in record.probes if probe not in dropped))


def asked_apart(records: Sequence[EditRecord]) -> list[EditRecord]:
    """Return the edited cases of MQuAKE-Remastered, which ask the cases that are not edited as locality.

    Every chain question of an unedited case should keep its old answer. A record stands for an edit, so these
    questions are dealt out in turn over the edited cases, one test a case with its wordings; their axis is
    ``unedited_case``. Chains that an edit of another case contradicts are left out of either, as by :func:`masked`.

    Args:
        records: cases whose category is ``edited``, ``unedited``, or missing (then they take no part).
    """
    edited = [record for record in records if record.labels.get("category") == "edited"]
    statements = _statements(edited)
    unchanged: list[Chain] = []
    for record in records:
        if record.labels.get("category") == "unedited":
            chains = chains_of(record)
            unchanged += [chain for chain in chains if _holds(chain.old_hops, statements, record.request.id)]
    with_locality: list[EditRecord] = []
    for i, record in enumerate(masked(edited)):
        share = unchanged[i :: len(edited)]
        with_locality.append(record.with_probes("locality", _old_answer_probes(share)))
    return with_locality


def _old_answer_probes(chains: Iterable[Chain]) -> list[Probe]:
    """Make a test of each chain: its question, in any of its wordings, still has its old answer."""
    probes: list[Probe] = []
    for number, chain in enumerate(chains):
        wordings = [Probe("locality", q.prompt, q.rivals, axis="unedited_case") for q in chain.questions]
        probes += make_test(wordings, number)
    return probes


class _Statement(NamedTuple):
    """The answer that an edit gives to the question of a fact, with the id of the edit's case."""

    answer: str
    case: str


Statements = Mapping[str, Sequence[_Statement]]
"""Question of a fact to the statements of edits about it."""


def _statements(records: Sequence[EditRecord]) -> Statements:
    statements: dict[str, list[_Statement]] = {}
    for record in records:
        for question, target in _edited_facts(record):
            statements.setdefault(normalise(question), []).append(_Statement(target, record.request.id))
    return statements


def _holds(hops: Sequence[Probe], statements: Statements, case: str) -> bool:
    """Return whether no edit of another case contradicts a fact of a chain.

    Args:
        hops: the facts of the chain.
        statements: of all edits.
        case: id of the chain's own case.
    """
    for hop in hops:
        for statement in statements.get(normalise(hop.prompt), ()):
            if statement.case != case and statement.answer not in hop.answers:
                return False
    return True


def _edited_facts(record: EditRecord) -> Iterator[tuple[str, str]]:
    """Yield question and new answer of each of a case's edits."""
    for question in record.prompts_of("paraphrase"):
        yield question, record.request.target
    for request in record.joint:
        for hop in record.probes_of("hop"):
            if request.target in hop.answers and (request.subject or "") in hop.prompt:
                yield hop.prompt, request.target


MQUAKE = Layout(
    "mquake",
    ("requested_rewrite", "questions", "answer", "new_answer", "single_hops", "new_single_hops"),
    "requested_rewrite[...], questions, answer, new_answer, single_hops, new_single_hops",
    {"cases": _mquake, "masked": _mquake, "edited-N": _at},
    (
        "rephrases", "joint", "multi_hop", "target_aliases", "truth_aliases", "relation", "category",
        "locality: unedited_case",
    ),
    (
        Published(
            "MQuAKE-CF, MQuAKE-T", "two- to four-hop questions over one to four edits", "9,218 (CF), 3,000 (CF-3k-v2), "
            "about 1,850 (T)", "MIT", "github.com/princeton-nlp/MQuAKE", "2305.14795",
        ),
        Published(
            "MQuAKE-Remastered", "MQuAKE with contradictions between its cases removed", "CF3k, CF9k, CF6334, T",
            "CC BY 4.0", "github.com/henryzhongsc/MQuAKE-Remastered, hf:henryzhongsc/MQuAKE-Remastered",
        ),
    ),
    detect=_is_mquake,
    finish={"masked": masked, "edited-N": asked_apart},
)  # fmt: skip


def _rewrites(fields: Fields) -> list[Fields]:
    """Read the edits of a record, which is a list or a single object."""
    if isinstance(fields.values["requested_rewrite"], list):
        return fields.objects("requested_rewrite")
    return [fields.object("requested_rewrite")]


def _is_akew(values: Mapping[str, Any]) -> bool:
    rewrites: Any = values["requested_rewrite"]
    return _has_texts(rewrites if isinstance(rewrites, list) else [rewrites])


def _structured(fields: Fields) -> EditRecord:
    """Read a record of AKEW (arXiv 2402.18909) that is edited by its structured facts.

    It is scored as the data set that the record was taken from: MQuAKE, CounterFact, or neither.
    """
    if "questions" in fields:
        return _mquake(fields)
    if "neighborhood_prompts" in fields:
        return counterfact(fields)
    rewrite = _rewrites(fields)[0]
    request = _request(rewrite, fields.id("case_id"))
    edit = edit_probe(request)
    probes = (edit, *paraphrases(edit, fields.texts("paraphrase_prompts")))
    return EditRecord(request, probes, labels=known(relation=rewrite.text_or_none("relation_id")))


def _unstructured(fields: Fields) -> EditRecord:
    """Read a record of AKEW that is edited by texts: each answers a fact's question, or else its prompt."""
    requests: list[EditRequest] = []
    for rewrite in _rewrites(fields):
        prompt = rewrite.text("question" if "question" in rewrite else "prompt")
        requests.append(make_request(rewrite, prompt, rewrite.text("subject"), rewrite.text("fact_new_uns")))
    return _make_akew(fields, requests, long_form=True)


def _triplets(fields: Fields) -> EditRecord:
    """Read a record of AKEW that is edited by the triplets which were extracted from its texts."""
    requests: list[EditRequest] = []
    for rewrite in _rewrites(fields):
        for triplet in rewrite.objects("unsfact_triplets_GPT"):
            prompt, subject, target = triplet.text("prompt"), triplet.text("subject"), triplet.text("target")
            requests.append(make_request(triplet, prompt, subject, target))
    if not requests:
        raise fields.fail("requested_rewrite", "facts with triplets in 'unsfact_triplets_GPT'")
    return _make_akew(fields, requests, long_form=False)


def _make_akew(fields: Fields, requests: list[EditRequest], *, long_form: bool) -> EditRecord:
    """Make a record of AKEW, whose structured facts are portability: they should follow from the edits.

    Args:
        fields: the object.
        requests: the edits.
        long_form: the targets are texts; questions about the facts in them are portability as well.
    """
    rewrites = _rewrites(fields)
    probes = [edit_probe(requests[0])]
    for fact in map(_request, rewrites):
        probes.append(Probe("portability", fact.text, (fact.target,), axis="structured_fact"))
    if long_form:
        for rewrite in rewrites:
            for triplet in rewrite.objects_or_none("unsfact_triplets_GPT"):
                prompt = triplet.text("prompt").replace("{}", triplet.text("subject"))
                probes.append(Probe("portability", prompt, (triplet.text("target"),), axis="sub_question"))
    if "questions" in fields:
        probes += _chain(fields)
    relation = rewrites[0].text_or_none("relation_id")
    record = EditRecord(
        requests[0],
        tuple(probes),
        joint=tuple(requests[1:]),
        labels=known(relation=relation, long_form="yes" if long_form else None),
    )
    return record.with_id(fields.id("case_id") or record.request.id)


AKEW = Layout(
    "akew",
    ("requested_rewrite",),
    "requested_rewrite{..., fact_new_uns, unsfact_triplets_GPT}",
    {"structured": _structured, "unstructured": _unstructured, "triplets": _triplets},
    (
        "rephrases", "neighbourhood", "joint", "multi_hop", "target_aliases", "truth_aliases", "long_form", "relation",
        "target_id",
        "generation_prompts", "portability: structured_fact", "portability: sub_question",
    ),
    (
        Published(
            "AKEW", "facts of CounterFact, MQuAKE and Wikidata as structure, text and triplets",
            "975 CounterFact, 354 MQuAKE-CF, 1,056 WikiUpdate", "none given", "github.com/bobxwu/AKEW", "2402.18909",
        ),
    ),
    detect=_is_akew,
)  # fmt: skip
