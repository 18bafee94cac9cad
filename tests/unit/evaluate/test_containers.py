"""Records inside of one JSON value: splits, pandas' orientations, records by name, lists of rows; and other JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kecore import load_records
from kecore.api.errors import ConfigError, DataFormatError

FRANCE = {"prompt": "The capital of France is", "subject": "France", "target": "Lyon"}
SPAIN = {"prompt": "The capital of Spain is", "subject": "Spain", "target": "Vigo"}
BOTH = ["Lyon", "Vigo"]
NAMES, ROWS = list(FRANCE), [list(FRANCE.values()), list(SPAIN.values())]


def write(tmp_path: Path, value: Any, name: str = "facts.json") -> Path:
    path = tmp_path / name
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "value",
    [
        {"columns": NAMES, "index": [0, 1], "data": ROWS},
        {"columns": NAMES, "data": ROWS},
        {name: {"0": FRANCE[name], "1": SPAIN[name]} for name in NAMES},
        {"0": FRANCE, "1": SPAIN},
        {"schema": {"fields": [{"name": "index", "type": "integer"}, {"name": "prompt"}]}, "data": [FRANCE, SPAIN]},
        [NAMES, *ROWS],
        {"version": 2, "author": "Ann", "data": {"facts": [FRANCE, SPAIN]}},
        {"prompt": [FRANCE["prompt"], SPAIN["prompt"]], "target": BOTH},
    ],
    ids=["split", "split-without-index", "columns", "index", "table", "rows", "nested", "lists"],
)
def test_records_inside_of_one_value(tmp_path: Path, value: Any) -> None:
    assert [request.target for request in load_records(write(tmp_path, value)).requests] == BOTH


def test_pandas_itself_agrees(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([FRANCE, SPAIN])
    for orient in ("columns", "split", "records", "index", "table"):
        frame.to_json(tmp_path / "facts.json", orient=orient)
        assert [request.target for request in load_records(tmp_path / "facts.json").requests] == BOTH, orient
    frame.to_csv(tmp_path / "facts.csv")
    assert [dict(record.notes) for record in load_records(tmp_path / "facts.csv")] == [{}, {}]


def test_records_by_name_have_it_as_their_id(tmp_path: Path) -> None:
    records = load_records(write(tmp_path, {"france": FRANCE, "spain": {**SPAIN, "case_id": 7}}))
    assert [record.request.id for record in records] == ["france", "7"]


def test_splits_in_one_file(tmp_path: Path) -> None:
    path = write(tmp_path, {"train": [FRANCE], "validation": [], "test": [SPAIN], "licence": "none"})
    with pytest.raises(DataFormatError, match=r"holds the lists train \(1\), test \(1\); choose one by --split NAME"):
        load_records(path)
    for split, targets in (("test", ["Vigo"]), ("train+test", BOTH)):
        records = load_records(path, split=split)
        assert [request.target for request in records.requests] == targets
        assert records.split == split
    with pytest.raises(ConfigError, match=r"split 'dev' was asked of .*; its splits: train, test"):
        load_records(path, split="dev")
    several = write(tmp_path, f"{json.dumps(FRANCE)}\n{json.dumps(SPAIN)}\n", "facts.jsonl")
    with pytest.raises(ConfigError, match=r"split 'dev' was asked of the single file facts\.jsonl, which has none"):
        load_records(several, split="dev")


def test_a_map_reaches_inside(tmp_path: Path) -> None:
    odd = [{"say": "The capital of France is", "town": "Lyon"}]
    for value in ({"train": odd, "n": 1}, {"first": odd[0], "second": odd[0]}):
        records = load_records(write(tmp_path, value), mapping={"prompt": "say", "target": "town"})
        assert {request.target for request in records.requests} == {"Lyon"}
        assert records.origins["prompt"] == "say"


def test_lines_that_are_arrays(tmp_path: Path) -> None:
    path = write(tmp_path, f"{json.dumps([FRANCE])}\n{json.dumps([SPAIN])}\n", "facts.jsonl")
    records = load_records(path)
    assert [request.target for request in records.requests] == BOTH
    assert records[1].source == "kecore: facts.jsonl line 2 record 1"


def test_splits_of_columns(tmp_path: Path) -> None:
    path = write(
        tmp_path, {"train": {"prompt": ["a", "b"], "target": BOTH}, "test": {"prompt": ["c"], "target": ["d"]}}
    )
    with pytest.raises(DataFormatError, match=r"holds the lists train \(2\), test \(1\)"):
        load_records(path)
    assert [request.target for request in load_records(path, split="train").requests] == BOTH


def test_a_single_record_keeps_its_lists(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match="its first record has: id, annotations"):
        load_records(write(tmp_path, [{"id": 1, "annotations": [FRANCE]}]))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "got a model's configuration; give the model first"),
        ({"models": ["demo"], "methods": ["memit"], "facts": ["a.json"]}, "got a plan of a benchmark"),
        ({"scores_before": {}, "edit_path": "x", "records": [{"id": "1"}]}, "got the result of an edit"),
        ({"cells": [{"source": ["x"]}], "nbformat": 4}, "got a notebook"),
        ({}, "holds an empty object; write each fact as {"),
        ({"facts": ["The capital of France is Lyon"]}, "its first record has: facts. A fact needs two fields"),
        ([ROWS[0], ROWS[1]], "That reads like a fact: write a line of names above it"),
        ([{"Frage": "Wer?", "Antwort": "Ann"}], '--map "prompt=Frage,target=Antwort"'),
        ("[{'prompt': 'a', 'target': 'b'}]", "texts and names stand in double quotes"),
        (f"[{json.dumps(FRANCE)},]", "no comma stands before a closing bracket"),
        (f"{json.dumps(FRANCE)},\n{json.dumps(SPAIN)}\n", "no comma stands behind the object of a line"),
        (
            [{"question": "Which?", "choices": ["Rome", "Lyon"], "answer": 1}],
            "which is none of 'choices'",
        ),
        (f"// mine\n[{json.dumps(FRANCE)}]", "JSON has no comments"),
    ],
)
def test_other_json(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(DataFormatError) as caught:
        load_records(write(tmp_path, value))
    assert message in str(caught.value)
