"""Every loader on the real files of the benchmarks, as far as they are at hand."""

from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from kecore.api.errors import DataFormatError, KecoreWarning
from kecore.evaluate import RecordSet, load_records
from kecore.evaluate.probes import chains_of
from kecore_datasets.triples import import_triples, read_templates, read_triples

FILES = [
    # file, format, records, records that cannot be represented, portability axes, locality axes
    ("counterfact/counterfact-6k.json.gz", "counterfact", 5109, 0, "", ""),
    ("counterfact/counterfact.json.gz", "counterfact", 785, 0, "one_hop", "distracting other_attribution"),
    ("counterfact/counterfact_subject_replace.json", "counterfact", 170, 0, "subject_replace", ""),
    ("counterfact/counterfact-edit.json.gz", "easyedit", 7953, 0, "", "neighbourhood"),
    ("counterfact/counterfact-train.json.gz", "easyedit", 7981, 0, "", "neighbourhood"),
    ("counterfact/counterfact-val.json.gz", "easyedit", 1525, 0, "", "neighbourhood"),
    ("wise/hallucination-edit.json", "easyedit", 556, 0, "", "neighbourhood"),
    ("wise/temporal-edit.json", "easyedit", 75, 0, "", "neighbourhood"),
    ("zsre/zsre_mend_eval_portability.json", "zsre", 789, 0, "one_hop", "unrelated"),
    ("zsre/zsre_mend_train-1k.json", "zsre", 998, 2, "", "unrelated"),
    ("zsre/zsre_mend_train_10000.json.gz", "zsre", 8259, 0, "", "unrelated"),
    ("zsre/zsre_inverse_relation.json", "zsre", 308, 5, "inverse_relation", ""),
    ("zsre/zsre_subject_replace.json", "zsre", 230, 2, "subject_replace", ""),
    ("knowedit/ZsRE-test-all.json", "knowedit", 1052, 2,
     "Logical_Generalization Reasoning Subject_Aliasing", "Relation_Specificity"),
    ("knowedit/recent_train.json", "knowedit", 443, 0,
     "Logical_Generalization Reasoning Subject_Aliasing", "Forgetfulness Relation_Specificity"),
    ("knowedit/test_cf.json.gz", "knowedit", 684, 0,
     "Logical_Generalization Reasoning Subject_Aliasing", "Forgetfulness Relation_Specificity"),
    ("knowedit/train_cf.json.gz", "knowedit", 1428, 0,
     "Logical_Generalization Reasoning Subject_Aliasing", "Forgetfulness Relation_Specificity"),
    ("knowedit/wikibio-test-all.json", "knowedit-wikibio", 268, 0, "", "Relation_Specificity"),
    ("knowedit/wikibio-train-all.json", "knowedit-wikibio", 425, 0, "", "Relation_Specificity"),
    ("knowedit/blender_test.json.gz", "knowedit-convsent", 633, 0, "", "other_topic"),
    ("knowedit/blender_val.json.gz", "knowedit-convsent", 799, 0, "", "other_topic"),
    ("knowedit/trivia_qa_test.json", "knowedit-sanitation", 80, 0, "", "unrelated"),
    ("knowedit/trivia_qa_train.json", "knowedit-sanitation", 80, 0, "", "unrelated"),
    ("qaedit/QAEdit_1k.json", "qaedit", 691, 0, "", "unrelated"),
    ("knowns/known_1000.json", "knowns", 1209, 0, "", ""),
    ("wise/hallucination-train.json", "easyedit", 277, 0, "", "neighbourhood"),
    ("wise/temporal-train.json", "easyedit", 75, 0, "", "neighbourhood"),
    ("mquake/MQuAKE-CF-3k.json.gz", "mquake", 2410, 0, "", ""),
    ("mquake/MQuAKE-hard.json.gz", "mquake", 429, 0, "", ""),
    ("akew/MQuAKE-CF.json.gz", "akew", 283, 0, "", ""),
    ("unke/final_data_v2.json.gz", "unke", 785, 0, "sub_question", ""),
    ("editevery/editevery.json", "editeverything", 552, 0, "", ""),
    ("safeedit/SafeEdit_test-100.json", "safeedit", 100, 0,
     "only_question other_attack other_question other_question_and_attack", "knowledge_constraint"),
    ("cknowedit/ccks-CKnowEdit.json.gz", "cknowedit", 556, 0, "one_hop", "unrelated"),
    ("mzsre/mzsre_test_duplicate_enzh.json.gz", "mzsre", 562, 0,
     "one_hop zh_edit zh_one_hop zh_rephrase", "unrelated zh_unrelated"),
    ("mzsre/mzsre_test_duplicate_ende.json.gz", "mzsre", 562, 0,
     "de_edit de_one_hop de_rephrase one_hop", "de_unrelated unrelated"),
    ("bmike53/counterfact_test_zh.json.gz", "mzsre", 785, 0,
     "one_hop zh_edit zh_one_hop zh_rephrase", "unrelated zh_unrelated"),
    ("bmike53/wfd_test_zh.json.gz", "mzsre", 614, 0,
     "one_hop zh_edit zh_one_hop zh_rephrase", "unrelated zh_unrelated"),
    ("bmike53/wfd-train.json.gz", "mzsre", 4357, 0, "", "unrelated"),
    ("mlake/single_hop/zh_qa.json", "mlake", 1072, 0, "", ""),
    ("mlake", "mlake", 1072, 0, "zh_edit", ""),
    ("hallueditbench/meta_llama_3_8b_instruct", "hallueditbench", 1778, 0,
     "2_hop 3_hop 4_hop 5_hop 6_hop inverse_relation multiple_choice no_question yes_question", "unrelated"),
]  # fmt: skip


LONG = ("unke", "editeverything", "safeedit", "knowedit-wikibio")


def load(path: Path, **options: Any) -> RecordSet:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)
        return load_records(path, **options)


@pytest.mark.parametrize("row", FILES, ids=[row[0] for row in FILES])
def test_file(shared_data: Path, row: tuple[str, str, int, int, str, str]) -> None:
    name, format, count, unfit, portability, locality = row
    found = load(shared_data / name)
    assert (found.format, len(found), len(found.skipped)) == (format, count, unfit)
    assert sorted({probe.axis for record in found for probe in record.probes_of("portability")}) == portability.split()
    assert sorted({probe.axis for record in found for probe in record.probes_of("locality")}) == locality.split()
    assert len({record.request.id for record in found}) == count
    assert {"long_form" in record.labels for record in found} == {format in LONG or name.startswith("wise/")}
    for record in found:
        assert record.request.subject in record.request.text
        assert all(prompt == prompt.strip() != "" for prompt in record.prompts_of("paraphrase"))
        assert all(prompt == prompt.strip() != "" for prompt in record.prompts_of("neighbourhood"))
        assert all(probe.prompt for probe in record.probes)


CASES = [
    # file, layout, records, edits' first target, axes of portability, axes of locality
    ("tofu_avoidant_edits.json", "tofu", 400, "I don't know.", "truth_ratio", "retain"),
    ("dune_new_info.json", "dune", 200,
     "for Australia, Brunei, Cambodia, China, Indonesia, Japan, South Korea, Laos, Malaysia, Myanmar, New Zealand, "
     "the Philippines, Singapore, Thailand, and Vietnam.", "query", ""),
    ("memit_csk_20q_probe_set.json.gz", "memit_csk", 379, "False",
     "affected_neighborhood_object affected_neighborhood_subject affected_neighborhood_verb affected_reasoning",
     "unaffected_neighborhood_object unaffected_neighborhood_subject"),
]  # fmt: skip


@pytest.mark.parametrize("row", CASES, ids=[row[0] for row in CASES])
def test_files_of_public_repositories(shared_data: Path, row: tuple[str, str, int, str, str, str]) -> None:
    name, format, count, target, portability, locality = row
    path = shared_data.parent / "cases" / "real" / name
    if not path.is_file():
        pytest.skip(f"no such file: {path}")
    found = load(path)
    assert (found.format, len(found), found.skipped) == (format, count, ())
    assert found[0].request.target == target
    for kind, wanted in (("portability", portability), ("locality", locality)):
        assert sorted({probe.axis for record in found for probe in record.probes_of(kind)}) == wanted.split()


def test_counterfact_carries_every_probe(shared_data: Path) -> None:
    found = load(shared_data / "counterfact/counterfact-6k.json.gz")
    assert all(len(r.prompts_of("paraphrase")) == 2 and len(r.prompts_of("neighbourhood")) == 10 for r in found)
    assert all(r.request.ground_truth and len(r.prompts_of("generation")) == 10 for r in found)
    assert found[0].request.text == "The official religion of Edwin of Northumbria is"
    assert (found[0].request.target, found[0].request.ground_truth) == ("Islam", "Christianity")


def test_flat_counterfact_is_the_original_one(shared_data: Path) -> None:
    flat = {r.request.id: r for r in load(shared_data / "counterfact/counterfact-edit.json.gz")}
    shared = [r for r in load(shared_data / "counterfact/counterfact-6k.json.gz") if r.request.id in flat]
    assert len(shared) == 2624
    for record in shared:
        other = flat[record.request.id]
        assert other.request == record.request
        assert other.prompts_of("neighbourhood")[0] in record.prompts_of("neighbourhood")
    # As published: most "rephrases" of the flat files are CounterFact's generation prompts.
    real = sum(flat[r.request.id].prompts_of("paraphrase")[0] in r.prompts_of("paraphrase") for r in shared)
    drawn = sum(flat[r.request.id].prompts_of("paraphrase")[0] in r.prompts_of("generation") for r in shared)
    assert (real, drawn) == (433, 2191)


def test_sanitation_keeps_every_fact_once(shared_data: Path) -> None:
    for name in ("trivia_qa_train.json", "trivia_qa_test.json"):
        found = load(shared_data / "knowedit" / name)
        kept = [probe for record in found for probe in record.probes_of("locality")]
        assert len(kept) == 453
        assert {record.request.target for record in found} == {"I don't know."}


def test_sanitation_edits_one_file_and_asks_the_other(shared_data: Path) -> None:
    options = {"split": "train+test", "format": "knowedit-sanitation"}
    found = load(shared_data / "knowedit", **options)
    assert len(found) == 80
    assert all(record.request.text.startswith("Question:") for record in found)
    files = [shared_data / "knowedit" / f"trivia_qa_{split}.json" for split in ("train", "test")]
    edited, asked = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    assert {record.request.ground_truth for record in found} == {fact["ground_truth"] for fact in edited["K_F"]}
    # Every question of the test file is asked once, with a fact that has its answer.
    pairs = {(prompt, record.labels["category"]) for record in found for prompt in record.prompts_of("paraphrase")}
    form = "Question:{}\nAnswer:"
    assert pairs == {(form.format(q["question"].strip()), q["ground_truth"].lower()) for q in asked["success"]}
    kept = {prompt for record in found for prompt in record.prompts_of("locality")}
    assert kept == {form.format(q["question"].strip()) for q in asked["locality"]}
    answers = [load(shared_data / "knowedit", **options, variant=f"answer-{i}") for i in range(1, 6)]
    assert [len(some) for some in answers] == [16] * 5
    for some in answers:
        assert len({record.labels["category"] for record in some}) == 1
        assert {prompt for record in some for prompt in record.prompts_of("locality")} == kept


def test_mquake_chains_follow_from_the_edits(shared_data: Path) -> None:
    found = load(shared_data / "mquake/MQuAKE-CF-3k.json.gz")
    assert len(found.requests) == 4850
    for record in found:
        (chain,) = chains_of(record)
        assert len(chain.questions) == 3
        assert 2 <= len(chain.hops) == len(chain.old_hops) <= 4
        assert set(chain.hops[-1].answers) == set(chain.questions[0].answers)
        # Each edit's target is what some hop of the chain answers.
        assert all(any(r.target in hop.answers for hop in chain.hops) for r in record.requests)
        assert [r.id for r in record.joint] == [f"{record.request.id}.{i}" for i in range(2, len(record.requests) + 1)]


def test_masks_are_those_of_the_triples(shared_data: Path, tmp_path: Path) -> None:
    """Against the definition of MQuAKE-Remastered on the published triples, for 300 cases that are edited together.

    Then with the first 60 of them edited, and the others asked with their old answers.
    """
    path = shared_data / "mquake/MQuAKE-CF-3k.json.gz"
    cases = json.loads(gzip.decompress(path.read_bytes()))[:300]

    def contaminated(case: Any, edited: list[Any], name: str = "new_triples") -> bool:
        edits = [
            (other["case_id"], r["subject"], r["relation_id"], r["target_new"]["str"])
            for other in edited
            for r in other["requested_rewrite"]
        ]
        chain = zip(case["orig"][name], case["orig"][f"{name}_labeled"], strict=True)
        facts = [(labels[0], triple[1], labels[2]) for triple, labels in chain]
        return any(
            id != case["case_id"] and (s, r) == (subject, relation) and target != o
            for s, r, o in facts
            for id, subject, relation, target in edits
        )

    expected = [0 if contaminated(case, cases) else 1 for case in cases]
    assert 0 < sum(expected) < 300
    found = load(path, limit=300, variant="masked")
    assert [len(chains_of(record)) for record in found] == expected
    split = [{**case, "split": {"60": ["edited" if i < 60 else "unedited"]}} for i, case in enumerate(cases)]
    (tmp_path / "split.json").write_text(json.dumps(split), encoding="utf-8")
    apart = load(tmp_path / "split.json", variant="edited-60")
    assert [len(chains_of(record)) for record in apart] == [not contaminated(case, cases[:60]) for case in cases[:60]]
    tests: dict[tuple[str, str], list[str]] = {}
    for record in apart:
        for probe in record.probes_of("locality"):
            tests.setdefault((record.request.id, probe.test or probe.prompt), []).append(probe.prompt)
    kept = [case for case in cases[60:] if not contaminated(case, cases[:60], "triples")]
    wordings = [[question.strip() for question in case["questions"]] for case in kept]
    assert sorted(tests.values()) == sorted(wordings)  # the wordings of a question are one test
    assert 0 < len(kept) < 240


def test_akew_in_three_ways(shared_data: Path) -> None:
    path = shared_data / "akew/MQuAKE-CF.json.gz"
    edits = {way: load(path, variant=way) for way in ("structured", "unstructured", "triplets")}
    assert [len(found.requests) for found in edits.values()] == [346, 346, 2142]
    for structured, text in zip(edits["structured"], edits["unstructured"], strict=True):
        assert text.labels["long_form"] == "yes"
        assert [p.answers[0] for p in text.probes_of("portability") if p.axis == "structured_fact"] == [
            request.target for request in structured.requests
        ]


def test_parallel_sets_the_other_way_round(shared_data: Path) -> None:
    german = load(shared_data / "mzsre/mzsre_test_duplicate_ende.json.gz", variant="to-english")
    # 162 German questions do not hold the German name of their subject, in any spelling.
    assert (len(german), len(german.skipped)) == (400, 162)
    assert german[0].request.text == "Wann wurde die IAAF Combined Events Challenge ins Leben gerufen?"


def test_mlake_finds_the_edit_of_every_question(shared_data: Path) -> None:
    found = load(shared_data / "mlake")
    assert sum(len(chains_of(record)) for record in found) == 1024 + 789


def test_folders_by_split(shared_data: Path) -> None:
    with pytest.raises(DataFormatError, match="holds the splits edit, train"):
        load(shared_data / "wise")
    assert len(load(shared_data / "wise", split="edit")) == 631
    found = load(shared_data / "knowedit", split="test", format="knowedit")
    assert (len(found), len(found.skipped)) == (1052 + 684, 3 + 2)


def test_triples_with_their_own_templates(shared_data: Path) -> None:
    folder = shared_data / "relations" / "factual"
    triples = read_triples(folder)
    ours, theirs = import_triples(triples), import_triples(triples, read_templates([folder]))
    assert not ours.unknown
    assert not theirs.unknown
    assert len(theirs.records) == len(ours.records)
    assert len(theirs.records) + len(theirs.skipped) == len(triples)


def test_questions_with_answers_are_facts_without_a_subject(shared_data: Path) -> None:
    records = load_records(shared_data / "general/gsm8k.jsonl.gz", limit=3)
    assert [record.request.subject for record in records] == [None] * 3
    assert records.origins == {"prompt": "question", "target": "answer"}


@pytest.mark.parametrize("name", ["glue_eval/cola.jsonl"])
def test_other_data_sets_are_refused(shared_data: Path, name: str) -> None:
    with pytest.raises(DataFormatError, match="unknown layout"):
        load_records(shared_data / name)
