"""Triples of knowledge graphs, and the edits that relation templates make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kecore.api.errors import DataFormatError
from kecore.cli import app
from kecore.evaluate import load_records
from kecore_datasets.triples import Triple, import_triples, nearest_relation, read_labels, read_templates, read_triples

ANN = ("Ann", "mother tongue", "French")
TEMPLATES = {"mother tongue": ("{} speaks", "The language of {} is")}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", "Ann\tmother tongue\tFrench\n"),
        ("a.txt", "\nAnn\tmother tongue\tFrench\textra\n"),
        ("a.tsv", "tail\thead\trelation\nFrench\tAnn\tmother tongue\n"),
        ("a.csv", "sentence,relation,head,head_offset,tail\nAnn speaks,mother tongue,Ann,0,French\n"),
        ("a.json", json.dumps([ANN])),
        ("a.json", json.dumps([{"h": "Ann", "r": "mother tongue", "t": "French"}])),
        ("a.jsonl", json.dumps({"subject": "Ann", "predicate": "mother tongue", "object": "French"}) + "\n"),
        (
            "a.json",
            json.dumps({"input": "Ann speaks.", "relation": [{"head": "Ann", "relation": ANN[1], "tail": ANN[2]}]}),
        ),
        ("a.json", json.dumps([{"input": "x", "kg": [ANN]}])),
        ("a.json", json.dumps({"name": ANN[1], "samples": [{"subject": "Ann", "object": "French"}]})),
    ],
)
def test_triples_in_many_shapes(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    ((*parts, where),) = read_triples(tmp_path / name)
    assert tuple(parts) == ANN
    assert where.startswith(name)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "Ann\tspeaks\n", "line 1: expected subject, relation and object between tabs"),
        ("a.tsv", "\n", "is empty; expected JSON"),
        ("a.json", '[["Ann", "speaks"]]', "record 1: expected a list of three texts"),
        ("a.json", '[{"head": "Ann", "tail": "x"}]', "field 'relation' is missing"),
        ("a.json", '[{"head": "Ann", "relation": {}, "tail": "x"}]', "field 'relation' must be text, got dict"),
    ],
)
def test_what_is_no_triple(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataFormatError, match=message):
        read_triples(tmp_path / name)


def test_edits_of_triples() -> None:
    triples = [
        Triple("Ann", "Mother_Tongue", "French", "line 1"),
        Triple("Ann", "loves", "Bea", "line 2"),
        Triple("Ann", "mother tongue", "French", "line 3"),
        Triple("Ann", "mother tongue", "German", "line 4"),
        Triple("", "mother tongue", "German", "line 5"),
        Triple("Bea", "loves", "Ann", "line 6"),
        Triple("Bea", "hates", "Ann", "line 7"),
    ]
    found = import_triples(triples, TEMPLATES)
    (record,) = found.records
    assert (record.request.text, record.request.target) == ("Ann speaks", "French")
    assert record.prompts_of("paraphrase") == ("The language of Ann is",)
    assert (record.labels["relation"], record.source) == ("Mother_Tongue", "triple: line 1")
    assert list(found.unknown.items()) == [("loves", 2), ("hates", 1)]
    assert [item.reason for item in found.skipped] == [
        "line 3: repeats line 1",
        "line 4: gives 'German' where 'French' stands in line 1",
        "line 5: the subject is empty; name the entity the fact is about (prompt: '{} speaks')",
    ]


def test_labels_of_ids(tmp_path: Path) -> None:
    (tmp_path / "text.tsv").write_text("ent_1\tAnn\nrel_1\tmother tongue\nent_2\tFrench\n", encoding="utf-8")
    labels = read_labels([tmp_path / "text.tsv"])
    found = import_triples([Triple("ent_1", "rel_1", "ent_2", "line 1")], TEMPLATES, labels)
    assert found.records[0].request.target == "French"
    assert import_triples([Triple("ent_1", "rel_9", "ent_2", "line 1")], TEMPLATES, labels).unknown == {"rel_9": 1}
    (tmp_path / "text.tsv").write_text("ent_1\n", encoding="utf-8")
    with pytest.raises(DataFormatError, match="line 1: expected two texts between tabs"):
        read_labels([tmp_path / "text.tsv"])


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"Owns_A": "{} owns a"}),
        json.dumps([{"names": ["owns a", "P1830"], "templates": ["{} owns a"]}]),
        json.dumps({"name": "owns a", "prompt_templates": ["{} owns a"], "prompt_templates_zs": [], "samples": []}),
        "owns a\t{} owns a\n",
    ],
)
def test_templates_of_the_user_come_first(tmp_path: Path, text: str) -> None:
    path = tmp_path / "templates.json"
    path.write_text(text, encoding="utf-8")
    found = read_templates([path])
    assert found["owns a"] == ("{} owns a",)
    assert found["mother"] == found["p25"] == ("The name of the mother of {} is",)
    path.write_text(json.dumps({"mother": "{} is a child of"}), encoding="utf-8")
    assert read_templates([path])["mother"] == ("{} is a child of",)


def test_templates_need_one_place_for_the_subject(tmp_path: Path) -> None:
    path = tmp_path / "templates.json"
    for bad, message in (
        ({"owns": "owns a"}, r"expected one '\{\}' for the subject in the template 'owns a'"),
        ({"owns": []}, "expected at least one template"),
        ({"owns": {}}, "field 'owns' must be a list of texts"),
    ):
        path.write_text(json.dumps(bad), encoding="utf-8")
        with pytest.raises(DataFormatError, match=message):
            read_templates([path])


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["import-triples", *map(str, arguments)])


def test_command(tmp_path: Path) -> None:
    triples, out = tmp_path / "triples.tsv", tmp_path / "facts.jsonl"
    triples.write_text(
        "Ann\tnative language\tFrench\nAnn\tloves\tBea\nBea\tnative language\tDanish\n", encoding="utf-8"
    )
    result = run(triples, "--out", out)
    assert result.exit_code == 0
    assert "loves" in result.stdout
    assert "2 edits written" in result.stdout
    found = load_records(out)
    assert (found.format, found[0].request.text) == ("kecore", "The mother tongue of Ann is")
    again = run(triples, "--out", out)
    assert again.exit_code == 2
    assert "exists; choose another --out" in again.stderr
    values = json.loads(run(triples, "--out", out, "--force", "--limit", 2, "--json").stdout)
    assert (values["triples"], values["edits"], values["unknown_relations"]) == (2, 1, {"loves": 1})


def test_command_without_a_single_template(tmp_path: Path) -> None:
    triples = tmp_path / "triples.tsv"
    triples.write_text("Ann\tloves\tBea\n", encoding="utf-8")
    result = run(triples, "--out", tmp_path / "facts.jsonl")
    assert result.exit_code == 2
    assert "none of 1 triple" in result.stderr
    assert not (tmp_path / "facts.jsonl").exists()


def test_lines_that_are_triples(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('["Ann", "mother tongue", "French"]\n["Bob", "mother tongue", "Greek"]\n', encoding="utf-8")
    assert [triple.object for triple in read_triples(path)] == ["French", "Greek"]


@pytest.mark.parametrize(
    ("relation", "nearest"), [("CEO", "company ceo"), ("native_langage", "native language"), ("x", "")]
)
def test_the_relation_that_a_name_is_most_like(relation: str, nearest: str) -> None:
    assert nearest_relation(relation, read_templates()) == nearest


def test_known_relations_are_listed_without_triples() -> None:
    done = CliRunner().invoke(app, ["import-triples", "--list-relations"])
    assert done.exit_code == 0
    assert "company ceo" in done.stdout
