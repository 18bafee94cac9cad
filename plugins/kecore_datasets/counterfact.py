"""CounterFact: the original layout, with the extras of CounterFact-plus, and EasyEdit's flat one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kecore.api.types import EditRecord, Probe
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Published
from kecore.evaluate.probes import edit_probe, make_request, neighbours, openings, paraphrases
from kecore_datasets.shared import known, on_axis, one_hop

__all__ = ["COUNTERFACT", "EASYEDIT", "LEME", "counterfact"]


def _is_counterfact(values: Mapping[str, Any]) -> bool:
    rewrite: Any = values["requested_rewrite"]
    return isinstance(rewrite, Mapping) and "fact_new_uns" not in rewrite


def counterfact(fields: Fields) -> EditRecord:
    """Read a record of CounterFact (arXiv 2202.05262), CounterFact-plus (arXiv 2305.13172) or EVOKE.

    ``attribute_prompts`` (other subjects of which the target is true) enter no score of the papers and are left out.
    EVOKE (arXiv 2410.07819) asks where an overfitted edit writes its target although something else is right; there
    the target is the rival of the right answer.
    """
    rewrite = fields.object("requested_rewrite")
    prompt, subject = rewrite.text("prompt"), rewrite.text("subject")
    target_new = rewrite.object("target_new")
    target = target_new.text("str")
    truth = rewrite.object("target_true").text("str")
    request = make_request(fields, prompt, subject, target, truth, fields.id("case_id"))
    edit = edit_probe(request)
    other_relation: list[Probe] = []
    if "unrelated_relation" in fields:
        relation = fields.object("unrelated_relation")
        question, answers = relation.text("question"), relation.answers("object")
        other_relation.append(Probe("locality", question, answers, axis="other_attribution"))
    other_name: list[Probe] = []
    if "alternative_subject" in fields:
        text = request.about(fields.text("alternative_subject"))
        other_name.append(Probe("portability", text, (target,), axis="subject_replace"))
    return EditRecord(
        request,
        (
            edit,
            *paraphrases(edit, fields.texts("paraphrase_prompts")),
            *neighbours(edit, fields.texts("neighborhood_prompts")),
            *on_axis("locality", "distracting", fields.texts("distracting_neighborhood_prompts"), truth),
            *other_relation,
            *one_hop(fields),
            *other_name,
            *_overfit(fields, target, truth),
            *openings(fields.texts("generation_prompts")),
        ),
        labels=known(relation=rewrite.text_or_none("relation_id"), target_id=target_new.text_or_none("id")),
    )


def _overfit(fields: Fields, target: str, truth: str) -> list[Probe]:
    """Make EVOKE's probes: other prompts behind the edited fact, and another relation of the edited subject."""
    probes: list[Probe] = []
    for prompt in fields.texts("prefix_distraction"):
        probes.append(Probe("locality", prompt, (truth,), (target,), axis="prefix_distraction"))
    if "subject_specificity" in fields:
        question = fields.object("subject_specificity")
        answer = question.object("answer")
        names = (answer.text("value"), *answer.texts("aliases"))
        prompt = question.text("prompt").strip()
        probes.append(Probe("locality", prompt, names, (target,), axis="subject_specificity"))
    return probes


COUNTERFACT = Layout(
    "counterfact",
    ("case_id", "requested_rewrite"),
    "case_id, requested_rewrite{prompt, subject, target_new, target_true}",
    counterfact,
    (
        "rephrases", "neighbourhood", "generation_prompts", "relation", "target_id", "portability: one_hop",
        "portability: subject_replace", "locality: distracting", "locality: other_attribution",
        "locality: prefix_distraction", "locality: subject_specificity", "probes",
    ),
    (
        Published(
            "CounterFact", "facts made false on purpose, with paraphrases and neighbours", "21,919", "MIT",
            "github.com/kmeng01/rome", "2202.05262",
        ),
        Published(
            "MultiCounterFact", "the part of CounterFact whose facts do not contradict each other", "20,877", "MIT",
            "github.com/kmeng01/memit", "2210.07229",
        ),
        Published(
            "CounterFact-plus", "CounterFact with one-hop questions, aliases and distracted neighbours", "about 1,000",
            "MIT", "github.com/zjunlp/EasyEdit", "2305.13172",
        ),
        Published(
            "EVOKE", "CounterFact with prompts on which an overfitted edit writes its target", "not stated",
            "none given", "code of the paper", "2410.07819",
        ),
    ),
    detect=_is_counterfact,
)  # fmt: skip


def _leme(fields: Fields) -> EditRecord:
    """Read a fact of LEME (arXiv 2402.09394) in CounterFact's layout: the long texts that a model is asked for.

    There are two essays, as in the paper's code: one on the subject that must mention the first coupled entity, and one
    on that entity that must mention the subject. They take the place of CounterFact's generation prompts.
    """
    record = counterfact(fields)
    return record.with_probes("generation", openings(essays(fields, record.request.subject or "")))


def essays(fields: Fields, subject: str) -> list[str]:
    """Return the prompts of LEME's two essays; of a subject without a coupled entity, the one on the subject."""
    coupled = fields.object("coupled_prompts_and_properties")
    about_subject = coupled.object("subject_entity").text("coupled_prompt")
    entities = coupled.objects("coupled_entities")
    if not entities:
        return [f"{about_subject}\n\n{subject}"]
    entity, about_entity = entities[0].text("entity"), entities[0].text("coupled_prompt")
    return [
        f"{about_subject}\n- relationship to {entity}\n\n{subject}",
        f"{about_entity}\n- relationship to {subject}\n\n{entity}",
    ]


LEME = Layout(
    "leme",
    ("requested_rewrite", "paraphrase_prompts", "coupled_prompts_and_properties"),
    "CounterFact's fields, coupled_prompts_and_properties{subject_entity, coupled_entities}",
    _leme,
    COUNTERFACT.fills,
    (
        Published(
            "LEME CounterFact", "CounterFact with essays to write about subjects and entities coupled to them",
            "not stated", "MIT", "github.com/domenicrosati/longform-evaluation-model-editing", "2402.09394",
        ),
    ),
)  # fmt: skip


def _flat(fields: Fields) -> EditRecord:
    """Read a record of EasyEdit's flat layout: CounterFact, and the hallucination and temporal sets of WISE.

    The locality prompt is asked as locality, as EasyEdit does. Where its answer is the edit's old answer
    (all of CounterFact) it is a neighbour in CounterFact's sense too.

    The published ``rephrase_prompt`` is often no paraphrase: of the 5,109 cases we could hold against
    CounterFact's original layout, 4,266 have one of its generation prompts there ("People in Lyon's twin
    city speak the language of" for an edit of the twin city). Paraphrase scores on these files are
    therefore not CounterFact's PS; use the original layout for that.

    The sets of WISE have neither an old answer nor such a rephrase; their targets are sentences and paragraphs.
    """
    truth = fields.text_or_none("ground_truth")
    locality = fields.probe("locality", "locality_prompt", "locality_ground_truth", axis="neighbourhood")
    prompt, subject, target = fields.text("prompt"), fields.text("subject"), fields.text("target_new")
    request = make_request(fields, prompt, subject, target, truth, fields.id("case_id"))
    edit = edit_probe(request)
    is_neighbour = truth is not None and locality.answers == (truth,)
    is_of_wise = truth is None and "rephrase_prompt" not in fields
    return EditRecord(
        request,
        (
            edit,
            *paraphrases(edit, fields.texts("rephrase_prompt") + fields.texts("ood_rephrase")),
            *neighbours(edit, [locality.prompt] if is_neighbour else []),
            locality,
        ),
        labels=known(long_form="yes" if is_of_wise else None),
    )


EASYEDIT = Layout(
    "easyedit",
    ("prompt", "subject", "target_new", "locality_prompt"),
    "prompt, subject, target_new, locality_prompt, ...",
    _flat,
    ("rephrases", "neighbourhood", "long_form", "locality: neighbourhood"),
    (
        Published(
            "CounterFact, flat", "CounterFact as EasyEdit publishes it, one neighbour a fact", "21,919", "MIT",
            "github.com/zjunlp/EasyEdit", "2308.07269",
        ),
        Published(
            "WISE hallucination", "passages about people with corrected sentences", "600", "MIT",
            "github.com/zjunlp/EasyEdit", "2405.14768",
        ),
        Published(
            "WISE temporal", "events after the training data, asked in another form", "100", "MIT",
            "github.com/zjunlp/EasyEdit", "2405.14768",
        ),
    ),
)  # fmt: skip
