"""Large files, read record by record: the same records as of the whole file, and no more than asked for."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import published
import pytest

from kecore.api.errors import ConfigError, DataFormatError
from kecore.evaluate import RecordSet, load_records, streams

FACTS = [{**published.ULTRAEDITBENCH, "ans": f"Größe {number} \u2028 {{}}[]"} for number in range(5)]
ARRAY, INDENTED = json.dumps(FACTS), json.dumps(FACTS, indent=2, ensure_ascii=False)
LINES = "\n\n".join(map(json.dumps, FACTS))


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RecordSet]:
    """Read a file as a large one, a few characters at a time, and hold the records against those of the whole."""

    def read(path: Path, chunk: int = 7, **options: Any) -> RecordSet:
        whole = load_records(path, **options)
        with monkeypatch.context() as patch:
            patch.setattr(streams, "LARGE", 0)
            patch.setattr(streams, "_CHUNK", chunk)
            assert streams.open_stream(path, path.name) is not None
            found = load_records(path, **options)
        assert found == whole
        return found

    return read


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
@pytest.mark.parametrize("text", [ARRAY, INDENTED, LINES, f"\ufeff {INDENTED}\n", f"\ufeff{LINES}\r\n"])
@pytest.mark.parametrize("packed", [False, True])
def test_streams_give_the_records_of_the_whole_file(
    streamed: Callable[..., RecordSet], tmp_path: Path, text: str, packed: bool, chunk: int
) -> None:
    content = text.encode()
    path = tmp_path / ("facts.json.gz" if packed else "facts.json")
    path.write_bytes(gzip.compress(content) if packed else content)
    found = streamed(path, chunk)
    assert [record.request.target for record in found] == [fact["ans"] for fact in FACTS]
    assert len(streamed(path, chunk, limit=2)) == 2


def test_parquet_is_read_in_batches(
    streamed: Callable[..., RecordSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "facts.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(FACTS), path)
    monkeypatch.setattr(streams, "_ROWS", 2)
    assert len(streamed(path)) == 5
    path.write_bytes(path.read_bytes()[:-20])
    monkeypatch.setattr(streams, "LARGE", 0)
    with pytest.raises(DataFormatError, match="a broken Parquet file"):
        load_records(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ARRAY[:-2], r"facts\.json record 5: not JSON"),
        (ARRAY.replace('"Where does Ann live?"', "Where", 1), r"facts\.json record 1: not JSON"),
        (ARRAY.replace("}, {", "} {"), r"record 1: not JSON \(expected ',' or '\]' behind it\)"),
        (LINES + "\n{", r"facts\.json line 10: not JSON"),
        (ARRAY.replace('"loc":', '"prompt": "x", "loc":', 1), r"record 1: not JSON .field 'prompt' stands there twice"),
    ],
)
def test_broken_records_are_named_if_they_are_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    path = tmp_path / "facts.json"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(streams, "LARGE", 0)
    with pytest.raises(DataFormatError, match=message):
        load_records(path)


def test_what_is_beyond_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "facts.json"
    path.write_bytes(f"{LINES}\n".encode() + b"\xff\xfe not text\n" * 1000)
    monkeypatch.setattr(streams, "LARGE", 0)
    monkeypatch.setattr(streams, "_CHUNK", 64)
    with pytest.raises(DataFormatError, match="not UTF-8"):
        load_records(path)
    path.write_bytes(f"{LINES}\n".encode() + b"{not JSON\n" * 1000)
    assert len(load_records(path, limit=5)) == 5


def test_other_large_files_are_read_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LARGE", 0)
    for name, content in (
        ("facts.csv", b"prompt,subject,target\nRome is in,Rome,Gaul\n"),
        ("facts.json", json.dumps(FACTS[0], indent=1).encode()),
        ("facts.json", ARRAY.encode("utf-16")),
        ("facts.json.gz", gzip.compress(ARRAY.encode())[:-12]),
    ):
        (tmp_path / name).write_bytes(content)
        assert streams.open_stream(tmp_path / name, name) is None or name.endswith(".gz")
    assert streams.open_stream(tmp_path / "none.json", "none.json") is None
    (tmp_path / "facts.json").write_text(ARRAY, encoding="utf-8")
    with pytest.raises(ConfigError, match="split 'test' was asked of the single file"):
        load_records(tmp_path / "facts.json", split="test")


def test_values_are_those_of_the_whole_file(tmp_path: Path, streamed: Callable[..., RecordSet]) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"prompt": ["The plant has"], "target": arrow.array([0.1], type=arrow.float32()), "seen": [b"\x89PNG"]}
    parquet.write_table(arrow.table(columns), tmp_path / "facts.parquet")
    (record,) = streamed(tmp_path / "facts.parquet")
    assert (record.request.target, dict(record.notes)) == ("0.1", {"seen": "(4 bytes)"})


def test_text_behind_an_array_is_not_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(f"{json.dumps(FACTS)}\n{json.dumps(FACTS)}\n", encoding="utf-8")
    monkeypatch.setattr(streams, "LARGE", 0)
    with pytest.raises(DataFormatError, match="there is more behind the array"):
        load_records(path)
