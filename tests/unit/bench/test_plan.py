"""Plans of benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import published
import pytest
from make_records import make_record

from kecore.api.errors import ConfigError, DataFormatError, KecoreWarning, MethodNotFoundError
from kecore.api.types import EditRequest
from kecore.evaluate.protocol import Protocol
from kecore.evaluate.records import record_to_json
from kecore_bench.cells import cells_of
from kecore_bench.plan import BASELINES, BenchPlan, read_plan
from kecore_bench.report import results
from kecore_bench.store import Store

LEAST: dict[str, Any] = {"models": "demo", "facts": "facts.jsonl"}


def test_baselines_stand_in_every_plan_unless_excluded() -> None:
    rows = BenchPlan.make({**LEAST, "methods": ["memit", "ft-m"]}).rows
    assert [row.title for row in rows] == ["memit", "ft-m", "ice", "retrieval", "lora"]
    without = BenchPlan.make({**LEAST, "methods": ["memit"], "without": ["lora", "unedited"]}).rows
    assert [row.title for row in without] == ["memit", "ice", "retrieval", "ft-m"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "memit"}, "unknown key 'method'; did you mean 'methods'. known: "),
        ({"without": ["rome"]}, "rome, which is no baseline"),
        ({"methods": ["memit", "memit"]}, "the same label"),
        ({"sizes": [0]}, "at least 1"),
        ({"models": []}, "'models'"),
        ({"edit": "e", "protocol": {"edits": "single"}}, "leave 'edits' at batch"),
        ({"references": "snippets.json"}, r"extra: \[consistency\]"),
        ({"methods": [{"name": "memit", "sett": {}}]}, "methods"),
    ],
)
def test_bad_plans(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchPlan.make({**LEAST, **fields})


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(
        "models: [demo]\n"
        "facts: facts.jsonl\n"
        "methods:\n"
        "  - memit\n"
        "  - {name: rome, set: {steps: 5}}\n"
        "sizes: [10, 20]\n"
        "protocol: {edits: sequential, step: 5}\n"
    )
    plan = BenchPlan.make(read_plan(file))
    assert [row.title for row in plan.rows[:2]] == ["memit", "rome steps=5"]
    assert plan.protocol == Protocol(edits="sequential", step=5)
    assert plan.sizes == (10, 20)
    file.write_text("- memit\n")
    with pytest.raises(ConfigError, match="expected fields"):
        read_plan(file)
    file.write_text("a: [\n")
    with pytest.raises(DataFormatError, match="YAML"):
        read_plan(file)


def test_runs_in_order_and_keys_by_content(tmp_path: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text(
        '{"prompt": "{} is in", "subject": "A", "target": "B"}\n{"prompt": "{} is in", "subject": "C", "target": "D"}\n'
    )
    fields = {**LEAST, "facts": str(facts), "methods": ["ft-l"], "sizes": [1, 2], "without": ["ice", "lora"]}
    cells = cells_of(BenchPlan.make(fields))
    labels = ["unedited", "ft-l", "retrieval", "ft-m"]
    assert [(c.spec.size, c.spec.label) for c in cells] == [(size, label) for size in (1, 2) for label in labels]
    again = cells_of(BenchPlan.make(fields))
    assert [c.spec.key for c in again] == [c.spec.key for c in cells]
    assert len({c.spec.key for c in cells}) == len(cells)
    steps = cells_of(BenchPlan.make({**fields, "methods": [{"name": "ft-l", "set": {"steps": 3}, "label": "ft-l"}]}))
    assert steps[1].spec.key != cells[1].spec.key
    assert cells[1].spec.config["steps"] == 25
    facts.write_text(facts.read_text().replace("D", "E"))
    assert cells_of(BenchPlan.make(fields))[0].spec.key != cells[0].spec.key


def test_records_that_do_not_fit_are_kept_with_the_run(tmp_path: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    odd = {**published.ZSRE, "subject": "the Rhine"}
    facts.write_text("\n".join(map(json.dumps, (published.ZSRE, odd))))
    with pytest.warns(KecoreWarning, match="1 of 2 records"):
        (cell, *_) = cells_of(BenchPlan.make({**LEAST, "facts": str(facts)}))
    store = Store(":memory:", Protocol())
    store.add_run(cell.spec, {"versions": {}, "hardware": {}, "base": {}, "left_out": cell.left_out})
    ((where, reason),) = results(store)[0].left_out
    assert where == "facts.jsonl line 2"
    assert "'the Rhine' is not in the prompt" in reason


def test_a_method_has_one_name_however_it_is_spelt(tmp_path: Path) -> None:
    """Under it a session keeps what the method remembers; the label is what was written."""
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"prompt": "{} is in", "subject": "A", "target": "B"}\n')
    fields = {**LEAST, "facts": str(facts), "methods": ["MEMIT+Blue"], "without": ["unedited", *BASELINES]}
    (cell,) = cells_of(BenchPlan.make(fields))
    assert (cell.spec.label, cell.spec.method) == ("MEMIT+Blue", "memit + blue")


def test_only_a_baseline_may_be_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"prompt": "{} is in", "subject": "A", "target": "B"}\n')
    monkeypatch.setattr("kecore_bench.cells.BASELINES", (*BASELINES, "no-such-baseline"))
    monkeypatch.setattr("kecore_bench.plan.BASELINES", ("no-such-baseline",))
    fields = {**LEAST, "facts": str(facts)}
    assert [(c.spec.label, c.absent) for c in cells_of(BenchPlan.make(fields))] == [
        ("unedited", False), ("no-such-baseline", True)
    ]  # fmt: skip
    with pytest.raises(MethodNotFoundError):
        cells_of(BenchPlan.make({**fields, "methods": ["no-such-method"]}))


def test_reference_texts_are_part_of_the_data(tmp_path: Path) -> None:
    record = make_record(
        EditRequest("The capital of {} is", "France", "Rome", "Paris", id="a"), relation="P36", target_id="Q220"
    )
    facts, texts = tmp_path / "facts.jsonl", tmp_path / "snippets.json"
    facts.write_text(json.dumps(record_to_json(record)))
    texts.write_text(json.dumps([{"relation_id": "P36", "target_id": "Q220", "samples": [{"text": "Rome is old."}]}]))
    fields = {"models": ["a", "b"], "facts": str(facts), "without": BASELINES}
    plain = cells_of(BenchPlan.make(fields))
    asked = cells_of(BenchPlan.make({**fields, "references": texts, "protocol": {"extra": ["consistency"]}}))
    assert [cell.records[0].probes_of("generation")[0].answers for cell in asked] == [("Rome is old.",)] * 2
    assert {*asked[0].spec.data} - {*plain[0].spec.data} == {"references"}
    assert asked[0].spec.key != plain[0].spec.key
