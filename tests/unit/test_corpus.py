from __future__ import annotations

import builtins
import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kecore import data
from kecore.api.errors import DataFormatError, MissingDependencyError
from kecore.corpus import Corpus

LONG = "The Danube flows to the Black Sea, not to Berlin or Vienna"


def numbered(count: int) -> list[str]:
    return [f"{LONG}, said number {i}." for i in range(count)]


def write(path: Path, texts: list[str]) -> Path:
    if ".jsonl" in path.name:
        content = "\n".join(json.dumps({"text": text, "title": "x"}) for text in texts) + "\n\n"
    elif ".json" in path.name:
        content = json.dumps([{"text": text} for text in texts])
    else:
        content = "\n".join(texts)
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.txt.gz", "a.jsonl.gz", "a.json.gz", "a"])
def test_every_format_gives_the_same_passages(tmp_path: Path, name: str) -> None:
    texts = numbered(5)
    assert list(Corpus.of(write(tmp_path / name, texts)).passages()) == texts


def test_paragraphs_white_space_and_length(tmp_path: Path) -> None:
    texts = [f"{LONG}.\n\nToo short.\n\n  {LONG} \n again\t. ", "word " * 2000]
    passages = list(Corpus.of(write(tmp_path / "a.jsonl", texts)).passages())
    assert passages[:2] == [f"{LONG}.", f"{LONG} again ."]
    assert all(40 <= len(p) <= 4000 for p in passages)
    assert " ".join(passages[2:]) == ("word " * 2000).strip()


def test_the_texts_of_me_ppl_are_records_too(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"Corpus": "C4", "Text": LONG}, {"text": LONG + "!", "Text": "x"}]))
    assert list(Corpus.of(path).passages()) == [LONG, LONG + "!"]


def test_a_word_without_end_is_cut(tmp_path: Path) -> None:
    passages = list(Corpus.of(write(tmp_path / "a.txt", ["x" * 9000])).passages())
    assert [len(p) for p in passages] == [4000, 4000, 1000]


def test_sample_is_everything_where_there_is_less_than_asked(tmp_path: Path) -> None:
    texts = numbered(20)
    found = Corpus.of(write(tmp_path / "a.txt", texts)).sample(100, seed=3).passages
    assert sorted(found) == sorted(texts)
    assert found != texts


def test_sample_follows_the_seed_and_the_digest_the_text(tmp_path: Path) -> None:
    corpus = Corpus.of(write(tmp_path / "a.txt", numbered(50)))
    assert corpus.sample(5, 1) == corpus.sample(5, 1)
    assert corpus.sample(5, 1).passages != corpus.sample(5, 2).passages
    assert corpus.sample(5, 1).digest == corpus.sample(50, 2).digest
    moved = Corpus.of(write(tmp_path / "b.jsonl", numbered(50))).sample(5, 1)
    assert (moved.passages, moved.digest) == (corpus.sample(5, 1).passages, corpus.sample(5, 1).digest)
    changed = Corpus.of(write(tmp_path / "c.txt", [*numbered(49), numbered(1)[0]]))
    assert changed.sample(5, 1).digest != corpus.sample(5, 1).digest


def test_every_passage_is_as_likely(tmp_path: Path) -> None:
    corpus = Corpus.of(write(tmp_path / "a.txt", numbered(10)))
    seen = Counter(passage for seed in range(600) for passage in corpus.sample(2, seed).passages)
    assert set(seen) == set(numbered(10))
    assert all(80 < count < 165 for count in seen.values())  # 120 expected, four standard deviations


def test_several_sources_follow_one_another(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.txt", numbered(2)), write(tmp_path / "b.jsonl", numbered(3))
    corpus = Corpus.of(first, str(second))
    assert corpus.sources == (str(first), str(second))
    assert list(corpus.passages()) == numbered(2) + numbered(3)


def test_bundled_text_is_a_corpus() -> None:
    passages = Corpus.of(data.path("wikipedia_sample.jsonl.gz")).sample(8, 0).passages
    assert len(passages) == 8
    assert all(len(p) >= 40 for p in passages)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": ', "cannot be read as text"),
        (
            "a.jsonl",
            '{"title": "x", "body": "y"}',
            r"a\.jsonl, line 1: expected a record with a 'text' field, got body, title",
        ),
        ("a.jsonl", "[1]", "got list"),
        ("a.json", '[{"text": 3}]', "record 0: expected a record with a 'text' field"),
        ("a.json", "{", "cannot be read as text"),
        ("a.json", '{"text": "of one record"}', "expected a list of records, got dict"),
        ("a.txt", b"\xff\xfe\xfa", "cannot be read as text"),
        ("a.txt.gz", b"no gzip", "cannot be read as text"),
        ("a.txt", "Too short.", "no passages of at least 40 characters; is this text?"),
        ("a.txt", "", "no passages"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str | bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataFormatError, match=problem):
        Corpus.of(tmp_path / name).sample(3, 0)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-200], lambda raw: raw[:300] + b"???" + raw[303:]])
def test_a_damaged_archive_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    file = write(tmp_path / "a.txt.gz", numbered(500))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataFormatError, match="cannot be read as text"):
        Corpus.of(file).sample(3, 0)


def test_absent_files_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match=r"nowhere\.txt: no such text file"):
        Corpus.of(tmp_path / "nowhere.txt")
    with pytest.raises(DataFormatError, match="no text was given"):
        Corpus.of()


def test_hub_data_sets_need_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        MissingDependencyError, match=r"hf:wikitext needs the datasets library: pip install 'kecore\[data\]'"
    ):
        Corpus.of("hf:wikitext").sample(3, 0)


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("hf:wiki", ("wiki", None, "train")),
        ("hf:org/wiki:en", ("org/wiki", "en", "train")),
        ("hf:org/wiki:en:test", ("org/wiki", "en", "test")),
    ],
)
def test_hub_sources_name_data_set_config_and_split(
    monkeypatch: pytest.MonkeyPatch, source: str, arguments: tuple[str | None, ...]
) -> None:
    import sys
    from types import SimpleNamespace

    asked: list[tuple[str | None, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        assert streaming
        asked.append((name, config, split))
        return [{"text": text} for text in numbered(3)]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert list(Corpus.of(source).passages()) == numbered(3)
    assert asked == [arguments]
