"""Files: compression, JSON and JSONL, limits, and what is said about broken ones."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import published
import pytest

from kecore.api.errors import ConfigError, DataFormatError, KecoreWarning
from kecore.evaluate import RecordSet, load_records


def facts(count: int) -> list[dict[str, Any]]:
    return [{"id": f"f{i}", "prompt": "{} is in", "subject": f"City {i}", "target": "Asia"} for i in range(count)]


@pytest.fixture
def file(tmp_path: Path) -> Any:
    """Write lines (objects, or text as it is) into a JSONL file."""

    def write(*lines: Any, name: str = "facts.jsonl") -> Path:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path = tmp_path / name
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return path

    return write


def test_jsonl_json_and_gz_are_the_same(file: Any, tmp_path: Path) -> None:
    lines = load_records(file(*facts(3)))
    array = load_records(file(json.dumps(facts(3), indent=1), name="facts.json"))
    packed = tmp_path / "packed.bin"  # recognised by content, not by name
    packed.write_bytes(gzip.compress(("\ufeff" + json.dumps(facts(3))).encode()))
    for found in (array, load_records(packed)):
        assert found.requests == lines.requests
    assert isinstance(lines, RecordSet)
    assert lines.sha256 == hashlib.sha256(lines.path.read_bytes()).hexdigest()
    assert lines.skipped == ()
    assert lines[-1].request.id == "f2"
    assert lines[:2] == lines.records[:2]


def test_one_object_over_many_lines(file: Any) -> None:
    assert len(load_records(file(json.dumps(facts(1)[0], indent=2)))) == 1


def test_blank_lines_count_in_places_only(file: Any) -> None:
    found = load_records(file("", facts(1)[0], "", {**facts(2)[1]}, ""))
    assert [record.source for record in found] == ["kecore: facts.jsonl line 2", "kecore: facts.jsonl line 4"]


def test_limit_takes_the_first_and_reads_no_further(file: Any) -> None:
    path = file(*facts(8), "this is not JSON")
    assert [r.request.id for r in load_records(path, limit=6)] == [f"f{i}" for i in range(6)]
    with pytest.raises(DataFormatError, match=r"facts.jsonl line 9: not JSON"):
        load_records(path)
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        load_records(path, limit=0)


def test_format_by_name(file: Any) -> None:
    assert load_records(file(*facts(1)), format="kecore").format == "kecore"
    with pytest.raises(DataFormatError, match="line 1: field 'alt' is missing"):
        load_records(file(*facts(1)), format="zsre", skip_errors=False)
    with pytest.raises(ConfigError, match="no data set layout 'zrse'; did you mean 'zsre'"):
        load_records(file(*facts(1)), format="zrse")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subject": "Atlantis", "prompt": "Rome is in"}, "'Atlantis' is not in the prompt"),
        ({"target": ""}, "the target is empty"),
        ({"target": None}, "field 'target' is empty; it must be text"),
        ({"prompt": {"text": "a"}}, "field 'prompt' must be text, got dict"),
        ({"rephrazes": ["a"]}, "unknown field 'rephrazes'; did you mean 'rephrases'"),
        ({"rephrases": ["a", []]}, "field 'rephrases' must be a list of texts"),
        ({"locality": "a"}, "field 'locality' must be an object, got str"),
        ({"locality": {"x": ["a"]}}, r"'locality', 'x'\[0\]: expected an object, got str"),
        ({"locality": {"x": [{"answers": ["a"]}]}}, r"'locality'\[0\]|'x'\[0\]: field 'prompt' is missing"),
        ({"portability": {"x": [{"prompt": "p", "answers": {}}]}}, "field 'answers' must be an answer or"),
        ({"id": "f0"}, "field 'id' repeats 'f0' of facts.jsonl line 1; ids must differ"),
    ],
)
def test_own_layout_is_strict(file: Any, change: dict[str, Any], message: str) -> None:
    good, bad = facts(2)
    path = file(good, {**bad, **change})
    with pytest.raises(DataFormatError, match=message) as caught:
        load_records(path)
    assert "facts.jsonl line 2" in str(caught.value)
    with pytest.warns(KecoreWarning, match="1 of 2 records of facts.jsonl"):
        found = load_records(path, skip_errors=True)
    assert len(found) == 1
    assert found.skipped[0].where == "facts.jsonl line 2"


def test_a_bad_first_line_has_its_own_error(file: Any) -> None:
    first, second = facts(2)
    first["target"] = None
    with pytest.raises(DataFormatError, match="line 1: field 'target' is empty; it must be text"):
        load_records(file(first, second))
    with pytest.raises(DataFormatError, match="line 1: not JSON"):
        load_records(file("{'id': 1}", second))


def test_published_records_that_do_not_fit_are_listed(file: Any) -> None:
    odd = {**published.ZSRE, "subject": "the Rhine"}
    with pytest.warns(KecoreWarning, match="1 of 2 records"):
        found = load_records(file(published.ZSRE, odd))
    assert len(found) == 1
    ((where, reason),) = found.skipped
    assert where == "facts.jsonl line 2"
    assert "'the Rhine' is not in the prompt" in reason
    with pytest.raises(DataFormatError, match="line 2: the subject 'the Rhine'"):
        load_records(file(published.ZSRE, odd), skip_errors=False)
    with pytest.raises(DataFormatError, match=r"no record of facts\.jsonl is usable; the first: "):
        load_records(file(odd))


def test_unknown_layout_lists_keys_and_layouts(file: Any) -> None:
    with pytest.raises(DataFormatError, match="its first record has: sentence, topic") as caught:
        load_records(file({"sentence": "a", "topic": 1}))
    assert '--map "prompt=FIELD,target=FIELD"' in str(caught.value)
    with pytest.raises(DataFormatError, match=r"nearest layouts: knowns \(lacks prompt"):
        load_records(file({"subject": "a", "attribute": "b", "known_id": 1}))
    with pytest.raises(DataFormatError, match="expected objects, got str"):
        load_records(file('["a", "b"]'))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"[]", "holds no records"),
        (b"[1,", "not JSON"),
        (b"\xe9t\xe9;1", "read as Windows-1252 it is 'été;1'; if that is right"),
        (b"GGUF\x03\x00", "expected facts as JSON.*, got a GGUF model"),
        (b'\x10\x00\x00\x00\x00\x00\x00\x00{"a":1}', r"got a \.safetensors file"),
        (b"PK\x03\x04broken", "a broken zip archive"),
        (b"PAR1broken", "a broken Parquet file"),
        (gzip.compress(b"[]" * 50, mtime=0)[:-12], "gzip data is broken"),
        (b"\x1f\x8bnonsense", "gzip data is broken"),
    ],
)
def test_broken_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "facts.json"
    path.write_bytes(content)
    with pytest.raises(DataFormatError, match=message):
        load_records(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match="cannot be read"):
        load_records(tmp_path / "none.json")
    with pytest.raises(DataFormatError, match=r"no \.json, \.jsonl, .*, \.parquet, .* files in this folder"):
        load_records(tmp_path)
