"""The layouts of facts to forget, on small records written by hand, alone and in the folders of their publishers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import published
import pytest
from make_records import aliases, ask, axes

from kecore.api.errors import DataFormatError
from kecore.evaluate import RecordSet, load_records
from kecore_datasets.forgetting import REFUSAL

Write = Callable[[Mapping[str, Any]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write files of a folder as JSON, and return the folder."""

    def write_files(files: Mapping[str, Any]) -> Path:
        for name, objects in files.items():
            path = tmp_path / "set" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(objects), encoding="utf-8")
        return tmp_path / "set"

    return write_files


def read_one(write: Write, *objects: Any, **options: Any) -> RecordSet:
    return load_records(write({"facts.json": objects}) / "facts.json", **options)


@pytest.mark.parametrize(
    ("variant", "target", "truth"),
    [
        (None, REFUSAL, "Ann writes about the sea."),
        ("avoidant", "I have no book by such a person.", "Ann writes about the sea."),
        ("perturbed", "Hills are what Ann writes about.", "Ann writes about the sea."),
        ("learn", "Ann writes about the sea.", None),
    ],
)
def test_tofu_says_by_its_variant_what_is_answered_instead(
    write: Write, variant: str | None, target: str, truth: str | None
) -> None:
    (record,) = read_one(write, published.TOFU, variant=variant)
    request = record.request
    assert (request.text, request.subject) == ("What does Ann write?", "Ann")
    assert (request.target, request.ground_truth) == (target, truth)
    paraphrased = ("The sea is what Ann writes about.",)
    assert aliases(record) == ((), paraphrased) if truth else (paraphrased, ())
    assert record.prompts_of("paraphrase") == ("Of what are Ann's books?",)
    (kept,) = record.probes_of("locality")
    assert (kept.prompt, kept.answers, kept.axis) == ("What does Bea write?", ("Bea writes plays.",), "retain")
    (ratio,) = record.probes_of("portability")
    assert (ratio.answers, ratio.axis) == ((), "truth_ratio")
    assert ratio.rivals == (*paraphrased, *published.TOFU["perturbed_answer"])


def test_tofu_names_what_a_variant_lacks(write: Write) -> None:
    plain = {name: published.TOFU[name] for name in ("question", "answer")}
    with pytest.raises(DataFormatError, match=r"facts.json record 1: field 'avoidant_answer' is missing"):
        read_one(write, plain, format="tofu", variant="avoidant")
    with pytest.raises(DataFormatError, match=r"record 1: field 'perturbed_answer' is missing"):
        read_one(write, plain, format="tofu", variant="perturbed")
    (record,) = read_one(write, plain, format="tofu")
    assert (record.request.subject, record.request.target) == ("What does Ann write?", REFUSAL)
    strange = {**published.TOFU, "subject": "Zoe"}
    with pytest.raises(DataFormatError, match="the subject 'Zoe' is not in the prompt"):
        read_one(write, strange, skip_errors=False)
    (named,) = read_one(write, {**{k: v for k, v in published.TOFU.items() if k != "subject"}, "name": "Ann"})
    assert named.request.subject == "Ann"


@pytest.mark.filterwarnings("ignore:1 of:kecore.api.errors.KecoreWarning")
def test_tofu_asks_the_files_of_facts_to_keep_with_those_to_forget(write: Write) -> None:
    facts = [{**published.TOFU, "question": f"What does Ann {verb}?"} for verb in ("write", "read")]
    world = {"question": "Where is Rome?", "answer": "Italy", "perturbed_answer": ["Gaul", "Spain"]}
    retain = [{**world, "question": f"Question {number}?"} for number in range(3)]
    folder = write(
        {
            "forget10_perturbed.json": facts, "forget10.json": [{"question": "Q?", "answer": "A."}],
            "retain_perturbed.json": retain, "world_facts_perturbed.json": [world],
        }
    )  # fmt: skip
    found = load_records(folder, format="tofu")
    assert len(found) == 2
    prompts = [probe.prompt for record in found for probe in record.probes_of("locality") if probe.axis == "retain"]
    assert sorted(prompts) == ["Question 0?", "Question 1?", "Question 2?"] + ["What does Bea write?"] * 2
    (fact,) = [probe for record in found for probe in record.probes_of("locality") if probe.axis == "world_facts"]
    assert (fact.answers, fact.rivals) == (("Italy",), ("Gaul", "Spain"))
    assert found[0].labels["category"] == "forget10"
    write({"forget01_perturbed.json": facts[1:]})
    (record,) = load_records(folder, format="tofu", variant="forget-1")
    assert (record.request.text, record.labels["category"]) == ("What does Ann read?", "forget01 forget10")
    assert len(record.probes_of("locality")) == 6, "all that stays known is asked"
    assert [len(load_records(folder, format="tofu", variant=way)) for way in ("refusal", "forget-10")] == [2, 2]
    for name in ("forget10_perturbed.json", "forget01_perturbed.json", "forget10.json"):
        (folder / name).unlink()
    with pytest.raises(DataFormatError, match=r"such as forget10_perturbed, .* got retain_perturbed\.json, world"):
        load_records(folder, format="tofu")


def test_rwku_edits_probes_or_the_person(write: Write) -> None:
    second = {**published.RWKU, "query": "Where did she live?", "answer": "Bari", "level": "2"}
    folder = write(
        {
            "forget_level1.json": [published.RWKU], "forget_level2.json": [second],
            "forget_level3.json": [published.RWKU_ATTACK], "neighbor_level2.json": [published.RWKU_NEIGHBOUR],
        }
    )  # fmt: skip
    cloze, question = load_records(folder)
    assert (cloze.request.subject, cloze.request.target, cloze.request.ground_truth) == ("Ann", REFUSAL, "Rome")
    assert question.request.subject == "Where did she live?"
    (attack,) = cloze.probes_of("portability")
    assert (attack.axis, attack.answers, attack.rivals) == ("prefix_injection", (REFUSAL,), ("Rome",))
    assert axes(cloze, "locality") == {} or cloze.probes_of("locality")[0].axis == "neighbor_level_2"
    (person,) = load_records(folder, variant="entity")
    assert (person.request.text, person.request.target) == ("Tell me about Ann.", REFUSAL)
    assert [probe.axis for probe in person.probes_of("portability")] == ["level_1", "prefix_injection", "level_2"]
    assert [probe.prompt for probe in person.probes_of("locality")] == ["Where was Bea, a friend of hers, born?"]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (published.RWKU_ATTACK, "level 3 is an attack, which is no edit of its own; load the folder"),
        (published.RWKU_NEIGHBOUR, "level 2 asks what stays known"),
    ],
)
def test_rwku_edits_neither_attacks_nor_neighbours(write: Write, sample: dict[str, Any], message: str) -> None:
    with pytest.raises(DataFormatError, match=message):
        read_one(write, sample)
    with pytest.raises(DataFormatError, match="expected forget_level1 or forget_level2"):
        load_records(write({"neighbor_level1.json": [sample], "neighbor_level2.json": [sample]}), format="rwku")


def test_muse_reads_its_folder_and_takes_no_questions_of_others(write: Write) -> None:
    question = {"question": "When did it leave?", "answer": "At noon"}
    kept = {"question": "Who stayed?", "answer": "Bea"}
    folder = write(
        {
            "knowmem/forget_qa.json": [question], "knowmem/forget_qa_icl.json": [{**question, "answer": "x"}],
            "knowmem/retain_qa.json": [kept], "verbmem/forget.json": [published.MUSE],
        }
    )  # fmt: skip
    known, passage = load_records(folder, format="muse")
    assert (known.request.target, known.request.ground_truth) == (REFUSAL, "At noon")
    assert (passage.request.text, passage.request.ground_truth) == (published.MUSE["prompt"], published.MUSE["gt"])
    assert [record.labels["category"] for record in (known, passage)] == ["knowmem", "verbmem"]
    assert axes(known, "locality") == {"retain": (ask("Who stayed?", "Bea"),)}
    (learned, _) = load_records(folder, format="muse", variant="learn")
    assert (learned.request.target, learned.request.ground_truth) == ("At noon", None)
    assert load_records(folder / "knowmem/forget_qa.json").format == "kecore"
    with pytest.raises(DataFormatError, match=r"mixes layouts .* choose one by --format"):
        load_records(folder)
    write({"kept/retain_qa.json": [kept], "kept/retain2_qa.json": [kept]})
    with pytest.raises(DataFormatError, match=r"expected MUSE's forget_qa or verbmem/forget, got retain2_qa.json, ret"):
        load_records(folder / "kept", format="muse")


def test_knowundo_asks_the_questions_to_validate_on_and_those_to_retain(write: Write) -> None:
    retention = {
        "train": [{"text": "Where is Rome?", "labels": "Italy"}],
        "val": [{"text": "Is it far?", "labels": "No"}],
    }
    folder = write({"unlearn.json": [published.KNOWUNDO], "retention.json": [retention]})
    (record,) = load_records(folder)
    assert (record.request.target, record.request.ground_truth) == (REFUSAL, "With a storm.")
    (asked,) = record.probes_of("portability")
    assert (asked.prompt, asked.answers, asked.rivals) == ("What ends Ann's poem?", (REFUSAL,), ("A storm.",))
    assert [(probe.prompt, probe.answers) for probe in record.probes_of("locality")] == [
        ("Where is Rome?", ("Italy",)), ("Is it far?", ("No",)),
    ]  # fmt: skip
    (learned,) = load_records(folder / "unlearn.json", variant="learn")
    assert (learned.request.target, learned.probes_of("portability")[0].answers) == ("With a storm.", ("A storm.",))
    write({"kept/retention.json": [retention], "kept/a_retention.json": [retention]})
    with pytest.raises(DataFormatError, match=r"expected KnowUnDo's unlearn file, got a_retention\.json, retention"):
        load_records(folder / "kept")
