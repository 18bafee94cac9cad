"""Tables, files and the page over a store that is filled by hand."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kecore.errors import ArtifactError, MethodNotFoundError, MissingDependencyError, ProtocolMismatchError
from kecore.evaluate.metrics import AnsweredProbe
from kecore.evaluate.protocol import Protocol
from kecore.evaluate.result import RecordResult
from kecore.evaluate.scoring import ContinuationScore
from kecore.evaluate.store import BEFORE, RunSpec, Store
from kecore.report import Table, results, tables, write_report
from kecore.report.drill import drill
from kecore.report.figures import curves, scatters, stages
from kecore.report.html import page
from kecore.report.results import Row
from kecore.report.text import latex, markdown, notes

MADE_ON = {"versions": {"kecore": "0", "torch": "1"}, "hardware": {"device": "cpu"}, "base": {}, "left_out": 0}
NASTY = 'Who said "</script><b>&" in {}?'


def score(chance: float) -> ContinuationScore:
    return ContinuationScore((math.log(chance) if chance else -math.inf,), (1,), (1 if chance > 0.5 else 2,))


def record(id: str, edit: float, near: float) -> RecordResult:
    probes = (
        AnsweredProbe("edit", "", NASTY, ("Rome",), (score(edit),), score(0.5), text="Rome"),
        AnsweredProbe("neighbourhood", "", "near", ("Paris",), (score(near),), score(0.5)),
    )
    return RecordResult(id, "", probes)


def spec(label: str, method: str | None, **fields: Any) -> RunSpec:
    data = {"name": "facts.jsonl", "sha256": "0" * 64, "format": "kecore"}
    return RunSpec(**{"label": label, "method": method, "model": "demo", "data": data, "size": 2, **fields})


def fill(store: Store, run: RunSpec, moment: str, chances: Sequence[tuple[float, float]]) -> None:
    store.add_run(run, MADE_ON)
    rows = {place: record(f"r{place}", *pair) for place, pair in enumerate(chances)}
    store.add(run.key, moment, rows)


@pytest.fixture
def store() -> Store:
    """Unedited, a good method with a label of special characters, a poor one, and one that is not there."""
    made = Store(":memory:", Protocol(max_new_tokens=4))
    fill(made, spec("unedited", None), BEFORE, [(0.1, 0.9), (0.2, 0.8)])
    good, poor, absent = spec("a_b & 50% | c", "good"), spec("poor", "poor"), spec("lora", "lora")
    fill(made, good, "after", [(0.9, 0.8), (0.8, 0.0)])
    stage = {"seconds": 4.0, "records": 2, "stages": {"values": 3.0}, "peak_memory_bytes": 1 << 30, "warnings": ["hm"]}
    made.add_cost(good.key, "all", stage)
    fill(made, poor, "after", [(0.1, 0.9)])
    made.add_run(absent, MADE_ON)
    made.fail(absent.key, "all", MethodNotFoundError("no method 'lora'"))
    return made


def test_scores_and_notes(store: Store) -> None:
    (table,) = tables(results(store))
    assert [(row.label, row.scores["edit_success"].value) for row in table.rows[:3]] == [
        ("unedited", 0.0), ("a_b & 50% | c", 1.0), ("poor", 0.0)
    ]  # fmt: skip
    assert table.rows[1].scores["neighbourhood_success"].value == 0.5
    assert table.rows[1].scores["neighbourhood_stability"].value == 0.5
    assert notes(table) == ["poor: unfinished, 1 of 2 records", "lora: not installed", "a_b & 50% | c warned: hm"]
    assert table.rows[1].result.seconds == 2.0
    assert stages(table).rows == [("a_b & 50% | c", {"values": 1.5, "other": 0.5}, 2.0)]
    (panel,) = scatters(table)
    assert [(label, x.value, y.value) for label, x, y in panel.points][1] == ("a_b & 50% | c", 0.5, 1.0)


def test_text_of_any_kind_stays_text(store: Store) -> None:
    found = results(store)
    text = page(tables(found), found)
    assert text.count("</script>") == 2
    assert "<b>&" not in text
    assert "a_b &amp; 50% | c" in text
    (group,) = json.loads(re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)[0])
    assert group["records"][0]["prompt"] == NASTY
    assert group["records"][1]["answers"][1][1][1] == 0.0  # of an infinite log-probability
    assert group["records"][1]["answers"][2] is None  # not scored by the poor one
    assert group["before"] == 0
    assert r"a\_b \& 50\% | c & 1.000" in latex(tables(found), found)
    assert r"| a_b & 50% \| c | 1.000 " in markdown(tables(found), found)


def test_without_a_rival_every_token_decides() -> None:
    store = Store(":memory:", Protocol())
    run = spec("m", "m")
    store.add_run(run, MADE_ON)
    probe = AnsweredProbe("locality", "x", "p", ("a", "b"), (score(0.4), score(0.9)))
    store.add(run.key, "after", {0: RecordResult("r0", "", (probe,))})
    (table,) = tables(results(store))
    assert drill(table)["records"][0]["answers"] == [[[True, 0.9, None, None]]]


def test_a_baseline_that_came_later_replaces_its_empty_row(store: Store) -> None:
    fill(store, spec("lora", "lora", config={"rank": 8}), "after", [(0.9, 0.9), (0.9, 0.9)])
    (table,) = tables(results(store))
    assert [row.label for row in table.rows].count("lora") == 1
    assert table.rows[-1].note == ""
    store.add_run(spec("poor", "poor", config={"steps": 9}), MADE_ON)  # begun, and not a record done
    assert [row.label for row in tables(results(store))[0].rows].count("poor") == 1


def test_two_settings_under_one_name_are_told_apart(store: Store) -> None:
    fill(store, spec("poor", "poor", config={"steps": 3}), "after", [(0.9, 0.9), (0.9, 0.9)])
    (table,) = tables(results(store))
    assert [row.label for row in table.rows][2:] == ["poor", "lora", "poor #2"]
    assert table.rows[-1].note == "has other settings than the first (steps 3, there None)"
    twice = results(store, store)
    assert [result.label for result in twice] == [row.label for row in table.rows]


def test_a_table_has_one_data_set_and_size(store: Store) -> None:
    fill(store, spec("big", "big", size=3), "after", [(0.9, 0.9)] * 3)
    found = results(store)
    assert [table.first.spec.size for table in tables(found)] == [2, 3]
    rows = tuple(Row(result, None) for result in found)
    with pytest.raises(ProtocolMismatchError, match="different models, data sets or numbers"):
        Table(rows, "after")


def test_retention() -> None:
    store = Store(":memory:", Protocol(edits="sequential", retention=1))
    run = spec("m", "m")
    fill(store, run, "after-1", [(0.9, 0.9)])
    fill(store, run, "at-end", [(0.9, 0.9), (0.1, 0.9)])
    fill(store, run, "at-edit", [(0.9, 0.9), (0.9, 0.9)])
    found = results(store)
    assert [(n, s.value) for n, s in found[0].retention("edit_success")] == [(1, 1.0), (2, 0.5)]
    assert [table.moment for table in tables(found)] == ["at-edit", "at-end"]
    assert curves(found)[0].lines[0].label == "m"
    text = page(tables(found), found)
    assert text.count("Retention") == 1
    assert "m: 0.500" in text


def test_drill_follows_the_last_moment(store: Store) -> None:
    (table,) = tables(results(store))
    shown = drill(table)
    assert [method["label"] for method in shown["methods"]] == ["unedited", "a_b & 50% | c", "poor"]
    assert shown["records"][0]["answers"][1][0] == [True, 0.9, 0.5, "Rome"]


def test_an_empty_store_and_a_missing_package(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match="no results yet"):
        results(Store(":memory:", Protocol()))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"kecore\[plot\]"):
        write_report([store], tmp_path, ["png"])
    assert "png" not in write_report([store], tmp_path, optional=True)
    assert (tmp_path / "index.html").is_file()
