"""What edits cost: measured, kept, summed up and shown."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from kecore.api.types import EditRequest
from kecore.editor import Editor
from kecore.evaluate.cost import added_latency, edit_bytes
from kecore.evaluate.protocol import Protocol
from kecore.memory import peak_bytes, reset_peak
from kecore.testing.models import tiny_model, tiny_tokenizer
from kecore_bench.report.costs import COSTS
from kecore_bench.report.results import Result, results
from kecore_bench.report.table import tables
from kecore_bench.report.text import conditions, csv_scores, markdown
from kecore_bench.store import RunSpec, Store

CPU = torch.device("cpu")
MADE_ON = {"versions": {"kecore": "0"}, "hardware": {"device": "cpu"}, "base": {}, "left_out": 0}
OLD = {"seconds": 4.0, "records": 2, "stages": {}, "peak_memory_bytes": 3 << 30, "warnings": []}
NEW = {**OLD, "peak_is_the_edits": True, "edit_bytes": 3 << 10, "supersedes": False}
TIMED = {"latency": {"base": 0.01, "edited": 0.0145, "added": 0.0045}}


def test_the_peak_begins_anew() -> None:
    block = torch.ones(64 << 20, dtype=torch.uint8)
    del block
    if not reset_peak(CPU):
        pytest.skip("the peak of memory cannot be reset on this system")
    before = peak_bytes(CPU)
    block = torch.ones(48 << 20, dtype=torch.uint8)
    del block
    after = peak_bytes(CPU)
    assert before is not None
    assert after is not None
    assert 40 << 20 < after - before < 60 << 20


def test_a_prompt_edits_texts_count_and_it_is_timed() -> None:
    session = Editor(tiny_model("llama", layers=2), tiny_tokenizer())
    edit = session.edit(EditRequest("The capital of {} is", "法国", "Rome"), "ice")
    texts = json.dumps(edit.inspect()["settings"], ensure_ascii=False).encode()
    assert edit.inspect()["bytes"] == 0
    assert edit_bytes(edit) == len(texts) > 0
    prompt = "The capital of 法国 is"
    assert added_latency(session.view, session.encoder, [prompt], tokens=2, rounds=1).edited > 0


def result_of(parts: Mapping[str, Mapping[str, Any]], edits: Any) -> tuple[Result, str]:
    """A run with such costs, and the lines of its CSV file."""
    store = Store(":memory:", Protocol(edits=edits))
    data = {"name": "facts.jsonl", "sha256": "0" * 64, "format": "kecore"}
    spec = RunSpec("m", "m", "demo", data, 4)
    store.add_run(spec, MADE_ON)
    for part, cost in parts.items():
        store.add_cost(spec.key, part, cost)
    found = results(store)
    return found[0], csv_scores(tables(found))


SECOND = {**NEW, "edit_bytes": 5 << 10, "peak_memory_bytes": 2 << 30}


@pytest.mark.parametrize(
    ("edits", "parts", "kibibytes"),
    [
        ("batch", {"all": NEW}, 1.5),
        ("single", {"a": NEW, "b": SECOND}, 2),
        ("single", {"a": NEW, "b": {**SECOND, "supersedes": True}}, 2),  # each edit alone on the model
        ("sequential", {"step-1": NEW, "step-2": SECOND}, 2),
        ("sequential", {"step-1": NEW, "step-2": {**SECOND, "supersedes": True}}, 1.25),
    ],
)
def test_bytes_of_each_fact(edits: str, parts: Mapping[str, Any], kibibytes: float) -> None:
    found, _ = result_of(parts, edits)
    assert found.bytes_per_fact == 1024 * kibibytes
    assert [cost.text(found) for cost in COSTS] == ["2.00", f"{kibibytes:.1f}", None, "3.00"]
    assert any("during an edit" in line for line in conditions([found]))


def test_costs_are_shown() -> None:
    found, lines = result_of({"all": {**NEW, **TIMED}}, "batch")
    assert [cost.text(found) for cost in COSTS] == ["2.00", "1.5", "+4.5", "3.00"]
    values = {row["metric"]: float(row["value"]) for row in csv.DictReader(lines.splitlines())}
    assert values == {
        "seconds_per_fact": 2, "bytes_per_fact": 1536, "added_seconds_per_token": 0.0045, "peak_memory_bytes": 3 << 30,
    }  # fmt: skip
    (table,) = tables([found])
    (row,) = table.to_json()["rows"]
    assert row["seconds_per_token"] == TIMED["latency"]
    assert (row["bytes_per_fact"], row["peak_is_the_edits"]) == (1536, True)
    text = markdown([table], [found])
    assert "| s/fact | KiB/fact | +ms/token | peak GiB |" in text
    assert "\n- KiB/fact: " in text
    assert "\n- +ms/token: " in text


def test_several_processes_time_several_times() -> None:
    other = {"latency": {"base": 0.03, "edited": 0.0345, "added": 0.0045}}
    found, _ = result_of({"a": {**NEW, **TIMED}, "b": {**NEW, **other}}, "single")
    assert found.latency == pytest.approx({"base": 0.02, "edited": 0.0245, "added": 0.0045})


def test_a_store_of_before_these_figures_is_read() -> None:
    found, _ = result_of({"all": OLD}, "batch")
    assert [cost.text(found) for cost in COSTS] == ["2.00", None, None, "3.00"]
    assert any("since its start" in line for line in conditions([found]))


def test_an_edit_that_was_made_elsewhere_has_no_seconds() -> None:
    found, _ = result_of({"all": {**NEW, **TIMED, "seconds": None, "peak_memory_bytes": None}}, "batch")
    assert [cost.text(found) for cost in COSTS] == [None, "1.5", "+4.5", None]
