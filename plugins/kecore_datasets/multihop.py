"""Chains of facts: MQuAKE and its remastered form, and AKEW, which gives each fact as a text as well."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

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
    """The single facts of a chain, asked as questions; the first answer is the one that the chain goes through."""
    return tuple(
        Probe("hop", hop.text("question"), hop.answers("answer") + hop.answers_or_none("answer_alias"))
        for hop in fields.objects_or_none(name)
    )


def _object(rewrite: Fields, name: str) -> str:
    """The object of a fact: ``{"str": ...}``, or flat as the Hugging Face hub's tables have it."""
    return rewrite.text(f"{name}_str") if f"{name}_str" in rewrite else rewrite.object(name).text("str")


def _request(rewrite: Fields, id: str = "") -> EditRequest:
    prompt, subject = rewrite.text("prompt"), rewrite.text("subject")
    return make_request(rewrite, prompt, subject, _object(rewrite, "target_new"), _object(rewrite, "target_true"), id)


def _chain(fields: Fields) -> tuple[Probe, ...]:
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
    """MQuAKE (arXiv 2305.14795): all edits of a case together, then the question that chains them.

    The first edit's own question is its rephrase; those of the others are among the hops. Aliases of the first
    edit's new and old object are those of the hop that asks for it. The remastered form marks for which numbers of
    edits a case is among the edited ones; those stand in the label ``category`` as ``edited: 1000 3000``.
    """
    first, *others = fields.objects("requested_rewrite")
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
        joint=tuple(map(_request, others)),
        labels=known(relation=first.text_or_none("relation_id"), category=_edited_at(fields)),
    )
    return record.with_id(request.id)


def _aliases(hops: tuple[Probe, ...], question: tuple[str, ...], answer: str) -> tuple[str, ...]:
    """Other names of an edit's object: those of the hop that asks the edit's question, else that it answers."""
    wordings = set(map(normalise, question))
    hop = next((hop for hop in hops if normalise(hop.prompt) in wordings), None)
    hop = hop or next((hop for hop in hops if answer in hop.answers), None)
    return () if hop is None else tuple(name for name in hop.answers if name != answer)


def _split(fields: Fields) -> Fields | None:
    """What the remastered form says of a case: number of edits to labels such as ``edited`` and ``test_unedited``."""
    name = "split" if "split" in fields else "6334_split"
    return fields.object(name) if name in fields else None


def _labelled(labels: Fields, number: str, word: str) -> bool:
    return any(word in label.split("_") for label in labels.texts(number))


def _edited_at(fields: Fields) -> str | None:
    """For which numbers of edits a case is among the edited ones, in words; None where the data set does not say."""
    labels = _split(fields)
    if labels is None:
        return None
    numbers = [number for number in labels.values if _labelled(labels, number, "edited")]
    ascending = sorted(numbers, key=lambda number: (len(number), number))
    return f"edited: {' '.join(ascending)}" if numbers else "unedited"


def _at(fields: Fields, edits: int) -> EditRecord:
    """A case of MQuAKE-Remastered at one of its numbers of edits; its category says which part it has there."""
    labels, number = _split(fields), str(edits)
    if labels is None:
        raise fields.fail("split", "what MQuAKE-Remastered says of a case at each number of edits")
    if number not in labels.values:
        raise DataFormatError(f"{labels.where}: no {number} edits here, only {', '.join(labels.values)}")
    record = _mquake(fields)
    others = {name: text for name, text in record.labels.items() if name != "category"}
    role = next((word for word in ("edited", "unedited") if _labelled(labels, number, word)), None)
    return replace(record, labels=others | known(category=role))


def masked(records: Sequence[EditRecord]) -> list[EditRecord]:
    """Cases that are edited together, without the chains that the edits of another case contradict.

    MQuAKE-Remastered (Zhong et al., ICLR 2025) masks, for each case, the edits of other cases that say something else
    about a fact of its chain (``get_edits_without_contamination`` of its code). Where all edits are in one model they
    cannot be masked, so what is left out here is the question. A fact is known by its own question, which MQuAKE writes
    alike for the same subject and relation.

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
    """The edited cases of MQuAKE-Remastered, which ask the cases that are not edited as locality.

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
            for chain in chains_of(record):
                if _holds(chain.old_hops, statements, record.request.id):
                    unchanged.append(chain)
    return [
        record.with_probes("locality", _asked_for_old_answers(unchanged[i :: len(edited)]))
        for i, record in enumerate(masked(edited))
    ]


def _asked_for_old_answers(chains: Iterable[Chain]) -> list[Probe]:
    """Make the tests that each chain's question, in any of its wordings, still has its old answer."""
    probes: list[Probe] = []
    for number, chain in enumerate(chains):
        wordings = [Probe("locality", q.prompt, q.rivals, axis="unedited_case") for q in chain.questions]
        probes += make_test(wordings, number)
    return probes


Statements = Mapping[str, Sequence[tuple[str, str]]]
"""Question of a fact to what edits say about it: the new answer, and the id of the case."""


def _statements(records: Sequence[EditRecord]) -> Statements:
    statements: dict[str, list[tuple[str, str]]] = {}
    for record in records:
        for question, target in _edited_facts(record):
            statements.setdefault(normalise(question), []).append((target, record.request.id))
    return statements


def _holds(hops: Sequence[Probe], statements: Statements, id: str) -> bool:
    """Whether no case but its own says something else about a fact of a chain."""
    for hop in hops:
        for target, owner in statements.get(normalise(hop.prompt), ()):
            if owner != id and target not in hop.answers:
                return False
    return True


def _edited_facts(record: EditRecord) -> Iterator[tuple[str, str]]:
    """Question and new answer of each of a case's edits."""
    yield from ((question, record.request.target) for question in record.prompts_of("paraphrase"))
    for request in record.joint:
        for hop in record.probes_of("hop"):
            if request.target in hop.answers and request.subject in hop.prompt:
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
    several = isinstance(fields.values["requested_rewrite"], list)
    return fields.objects("requested_rewrite") if several else [fields.object("requested_rewrite")]


def _is_akew(values: Mapping[str, Any]) -> bool:
    rewrites: Any = values["requested_rewrite"]
    return _has_texts(rewrites if isinstance(rewrites, list) else [rewrites])


def _structured(fields: Fields) -> EditRecord:
    """AKEW (arXiv 2402.18909), edited by its structured facts; scored as MQuAKE or CounterFact is, whence it came."""
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
    """AKEW, edited by texts that state the facts: the question, or else the prompt, should be answered by the text."""
    requests = [
        make_request(rewrite, _asked(rewrite), rewrite.text("subject"), rewrite.text("fact_new_uns"))
        for rewrite in _rewrites(fields)
    ]
    return _stated(fields, requests, long_form=True)


def _asked(rewrite: Fields) -> str:
    return rewrite.text("question" if "question" in rewrite else "prompt")


def _triplets(fields: Fields) -> EditRecord:
    """AKEW, edited by the triplets that were extracted from the texts."""
    triplets = [triplet for rewrite in _rewrites(fields) for triplet in rewrite.objects("unsfact_triplets_GPT")]
    requests = [make_request(t, t.text("prompt"), t.text("subject"), t.text("target")) for t in triplets]
    if not requests:
        raise fields.fail("requested_rewrite", "facts with triplets in 'unsfact_triplets_GPT'")
    return _stated(fields, requests, long_form=False)


def _stated(fields: Fields, requests: list[EditRequest], *, long_form: bool) -> EditRecord:
    """Make a record of such edits; that the structured facts follow is portability."""
    rewrites = _rewrites(fields)
    probes = [edit_probe(requests[0])]
    for fact in map(_request, rewrites):
        probes.append(Probe("portability", fact.text, (fact.target,), axis="structured_fact"))
    if long_form:
        triplets = [triplet for rewrite in rewrites for triplet in rewrite.objects_or_none("unsfact_triplets_GPT")]
        for triplet in triplets:
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
