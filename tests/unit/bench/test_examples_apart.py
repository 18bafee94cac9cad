"""A pool of demonstrations without the records that share a prompt with what is edited or asked."""

from __future__ import annotations

import json
from pathlib import Path

from kecore import EditRecord, EditRequest, Probe
from kecore.facts import without_overlap
from kecore_bench.cells import cells_of, examples_of
from kecore_bench.plan import BenchPlan


def fact(subject: str, neighbour: str) -> EditRecord:
    request = EditRequest("The capital of {} is", subject, "Paris", ground_truth="Rome", id=subject)
    return EditRecord(request, (Probe("neighbourhood", f"The capital of {neighbour} is", ("Rome",)),))


def test_any_prompt_in_common_is_an_overlap() -> None:
    pool = [fact("Italy", "Spain"), fact("Peru", "Chile"), fact("Japan", "China"), fact("Chad", "Mali")]
    asked = [fact("Italy", "Kenya"), fact("Ghana", "Chile"), fact("China", "Togo")]
    assert without_overlap(pool, asked) == [pool[3]]
    assert without_overlap(pool, []) == pool


def test_a_plan_leaves_them_out_and_is_another_run(tmp_path: Path) -> None:
    def written(name: str, subjects: list[str]) -> str:
        path = tmp_path / name
        rows = [{"prompt": "The capital of {} is", "subject": subject, "target": "Paris"} for subject in subjects]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    ike = {"name": "ike", "set": {"encoder": "character-ngrams"}}
    fields = {
        "models": "demo",
        "methods": [ike],
        "facts": [written("facts.jsonl", ["Italy", "Peru"])],
        "examples": written("pool.jsonl", ["Italy", "Japan", "Chad"]),
        "without": ["ice", "retrieval", "ft-m", "lora", "unedited"],
    }
    plan = BenchPlan.make(fields)
    apart = BenchPlan.make({**fields, "examples_apart": True})
    assert [record.request.subject for record in examples_of(plan)] == ["Italy", "Japan", "Chad"]
    assert [record.request.subject for record in examples_of(apart)] == ["Japan", "Chad"]
    (key,), (other,) = ([cell.spec.key for cell in cells_of(one)] for one in (plan, apart))
    assert key != other
