"""The view of benchmarks: a store's scores, what is missing of a run, and a store that is not there."""

from __future__ import annotations

import math
from pathlib import Path

from hand_scores import probe
from studio_page import Page

from kecore.evaluate import Protocol
from kecore.evaluate.result import RecordResult
from kecore.inference import ContinuationScore
from kecore_bench.store import BEFORE, RunSpec, Store

MADE_ON = {"versions": {"kecore": "0"}, "hardware": {"device": "cpu"}, "base": {}, "left_out": []}


def score(chance: float) -> ContinuationScore:
    return ContinuationScore((math.log(chance),), (1,), (1,))


def record(number: int, chance: float) -> RecordResult:
    return RecordResult(f"r{number}", "", (probe("edit", score(chance), answers=("Rome",), rival=score(0.5)),))


def test_a_store_is_read_with_what_is_missing(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    data = {"name": "facts.jsonl", "sha256": "0" * 64, "format": "kecore"}
    with Store(path, Protocol()) as store:
        for label, moment, chances in (("unedited", BEFORE, (0.1, 0.2)), ("memit", "after", (0.9,))):
            method = None if label == "unedited" else label
            spec = RunSpec(label=label, method=method, model="demo", data=data, size=2)
            store.add_run(spec, MADE_ON)
            store.add(spec.key, moment, {number: record(number, chance) for number, chance in enumerate(chances)})
    values = page.send("GET", f"/api/store?path={path}")
    (table,) = values["tables"]
    assert [(row["method"], row["scores"]["edit_success"]["value"]) for row in table["rows"]] == [
        ("unedited", 0.0),
        ("memit", 1.0),
    ]
    assert table["rows"][1]["note"] == "unfinished, 1 of 2 records"
    assert "edit_success" in [column["key"] for column in table["columns"]]


def test_a_store_that_is_not_there_is_told(page: Page, tmp_path: Path) -> None:
    error = page.refused("GET", f"/api/store?path={tmp_path / 'none.sqlite'}")
    assert error["type"] == "ArtifactError"
    assert "kecore bench" in error["message"]
