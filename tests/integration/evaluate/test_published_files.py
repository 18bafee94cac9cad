"""Every loader on the real files of the benchmarks, as far as they are at hand."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from kecore.errors import DataFormatError, KecoreWarning
from kecore.evaluate import RecordSet, load_records

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
    ("knowedit/blender_test.json.gz", "knowedit-convsent", 633, 0, "", ""),
    ("knowedit/blender_val.json.gz", "knowedit-convsent", 799, 0, "", ""),
    ("knowedit/trivia_qa_test.json", "knowedit-sanitation", 80, 0, "", "unrelated"),
    ("knowedit/trivia_qa_train.json", "knowedit-sanitation", 80, 0, "", "unrelated"),
    ("qaedit/QAEdit_1k.json", "qaedit", 691, 0, "", "unrelated"),
]  # fmt: skip


def load(path: Path) -> RecordSet:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)
        return load_records(path)


@pytest.mark.parametrize("row", FILES, ids=[row[0] for row in FILES])
def test_file(shared_data: Path, row: tuple[str, str, int, int, str, str]) -> None:
    name, format, count, unfit, portability, locality = row
    found = load(shared_data / name)
    assert (found.format, len(found), len(found.skipped)) == (format, count, unfit)
    assert sorted({axis for record in found for axis in record.portability}) == portability.split()
    assert sorted({axis for record in found for axis in record.locality}) == locality.split()
    assert len({record.request.id for record in found}) == count
    for record in found:
        assert record.request.subject in record.request.text
        assert all(prompt == prompt.strip() != "" for prompt in (*record.rephrases, *record.neighbourhood))
        for probes in (*record.locality.values(), *record.portability.values()):
            assert all(probe.prompt for probe in probes)


def test_counterfact_carries_every_probe(shared_data: Path) -> None:
    found = load(shared_data / "counterfact/counterfact-6k.json.gz")
    assert all(len(r.rephrases) == 2 and len(r.neighbourhood) == 10 for r in found)
    assert all(r.request.ground_truth and len(r.generation_prompts) == 10 for r in found)
    assert found[0].request.text == "The official religion of Edwin of Northumbria is"
    assert (found[0].request.target, found[0].request.ground_truth) == ("Islam", "Christianity")


def test_flat_counterfact_is_the_original_one(shared_data: Path) -> None:
    flat = {r.request.id: r for r in load(shared_data / "counterfact/counterfact-edit.json.gz")}
    shared = [r for r in load(shared_data / "counterfact/counterfact-6k.json.gz") if r.request.id in flat]
    assert len(shared) == 2624
    for record in shared:
        other = flat[record.request.id]
        assert other.request == record.request
        assert other.neighbourhood[0] in record.neighbourhood
    # As published: most "rephrases" of the flat files are CounterFact's generation prompts.
    real = sum(flat[r.request.id].rephrases[0] in r.rephrases for r in shared)
    drawn = sum(flat[r.request.id].rephrases[0] in r.generation_prompts for r in shared)
    assert (real, drawn) == (433, 2191)


def test_sanitation_keeps_every_fact_once(shared_data: Path) -> None:
    for name in ("trivia_qa_train.json", "trivia_qa_test.json"):
        found = load(shared_data / "knowedit" / name)
        kept = [probe for record in found for probe in record.locality["unrelated"]]
        assert len(kept) == 453
        assert {record.request.target for record in found} == {"I don't know."}


@pytest.mark.parametrize("name", ["mquake/MQuAKE-CF-3k.json.gz", "glue_eval/cola.jsonl", "unke/final_data_v2.json.gz"])
def test_other_data_sets_are_refused(shared_data: Path, name: str) -> None:
    with pytest.raises(DataFormatError, match="unknown layout"):
        load_records(shared_data / name)
