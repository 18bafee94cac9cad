"""Files are whole or not there, and nothing in them can change unnoticed."""

from __future__ import annotations

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kecore import files
from kecore.api.errors import ArtifactError, NumericalError
from kecore.files import load_or_make, read_tensors, write_atomic, write_json, write_tensors

HEADER = {"format": 1, "version": "9.9", "note": "ein Wörtchen 中", "list": [1, 2.5, None], "by": {"a": "b"}}
TENSORS = {
    "half": torch.tensor([1.5, -0.0, float("inf")], dtype=torch.bfloat16),
    "matrix": torch.arange(12.0).reshape(3, 4).t(),  # not contiguous
    "nothing": torch.zeros(0, 5),
    "number": torch.tensor(7),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_tensors(tmp_path / "made" / "a.safetensors", "thing", HEADER, TENSORS)


def test_what_is_written_is_read(file: Path) -> None:
    header, tensors = read_tensors(file, "thing", newest=1)
    assert {k: header[k] for k in HEADER} == HEADER
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_no_tensors_are_a_file_too(tmp_path: Path) -> None:
    file = write_tensors(tmp_path / "a.safetensors", "thing", HEADER, {})
    assert read_tensors(file, "thing")[1] == {}


def test_file_is_readable_by_others_and_alone(file: Path) -> None:
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert list(file.parent.iterdir()) == [file]


def test_every_flipped_byte_is_noticed(file: Path) -> None:
    whole = file.read_bytes()
    silent: list[int] = []
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        file.write_bytes(damaged)
        try:
            header, tensors = read_tensors(file, "thing")
        except ArtifactError:
            continue
        same = all(header.get(k) == v for k, v in HEADER.items()) and tensors.keys() == TENSORS.keys()
        if not same or not all(torch.equal(tensors[k], t) for k, t in TENSORS.items()):
            silent.append(place)
    assert silent == []


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 40, 300, -1])
def test_truncation_is_noticed(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"truncated or not a safetensors file"):
        read_tensors(file, "thing")


def test_strangers_are_told_apart(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file or directory; expected a kecore thing"):
        read_tensors(tmp_path / "absent", "thing")
    with pytest.raises(ArtifactError, match="no such file"):
        read_tensors(tmp_path, "thing")
    with pytest.raises(ArtifactError, match="expected a kecore other, got a kecore thing"):
        read_tensors(file, "other")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(2)}, foreign)
    with pytest.raises(ArtifactError, match="without a kecore header; expected a kecore thing"):
        read_tensors(foreign, "thing")
    save_file({"x": torch.zeros(2)}, foreign, metadata={"kecore": "[1"})
    with pytest.raises(ArtifactError, match="the header is corrupt"):
        read_tensors(foreign, "thing")
    foreign.write_text("not tensors")
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        read_tensors(foreign, "thing")


def test_a_newer_format_names_the_version_that_reads_it(file: Path) -> None:
    with pytest.raises(ArtifactError, match=r"written by kecore 9\.9 in a newer format"):
        read_tensors(file, "thing", newest=0)


def test_older_files_have_no_digest_of_the_header(tmp_path: Path, file: Path) -> None:
    head = {"kind": "thing", "digest": read_tensors(file, "thing")[0]["digest"], **HEADER}
    old = tmp_path / "old.safetensors"
    save_file({k: t.contiguous() for k, t in TENSORS.items()}, old, metadata={"kecore": json.dumps(head)})
    assert read_tensors(old, "thing")[0]["note"] == HEADER["note"]


@pytest.mark.parametrize("step", ["save_file", "replace", "fsync"])
def test_an_interrupted_write_leaves_what_was_there(file: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    before = file.read_bytes()

    def fail(*args: Any, **_kwargs: Any) -> None:
        if step == "save_file":
            Path(args[1]).write_bytes(b"half of")  # the disk is full after this
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files if step == "save_file" else os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        write_tensors(file, "thing", HEADER, {"x": torch.ones(3)})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_an_interrupt_leaves_no_file_where_none_was(tmp_path: Path) -> None:
    def interrupted(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a.txt", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_json(tmp_path: Path) -> None:
    file = write_json(tmp_path / "deep" / "a.json", HEADER)
    assert json.loads(file.read_text(encoding="utf-8")) == HEADER
    assert "中" in file.read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text(encoding="utf-8")) == HEADER


# What is kept in the cache.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KECORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Maker:
    """Counts how often it makes the same tensors."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"a": torch.arange(6.0).reshape(2, 3)}


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == {"a"} and torch.equal(found["a"], torch.arange(6.0).reshape(2, 3))


def test_kept_tensors_are_made_once(cache: Path) -> None:
    make = Maker()
    assert all(same(load_or_make("things", "digest", "thing", make)) for _ in range(3))
    assert make.calls == 1
    assert (cache / "things" / "digest.safetensors").is_file()
    assert same(load_or_make("things", "another", "thing", make))
    assert make.calls == 2


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign"])
def test_a_damaged_file_is_made_anew(cache: Path, damage: str) -> None:
    make = Maker()
    load_or_make("things", "digest", "thing", make)
    file = cache / "things" / "digest.safetensors"
    whole = file.read_bytes()
    flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    file.write_bytes({"truncated": whole[:-5], "flipped": flipped, "foreign": b"no tensors"}[damage])
    assert same(load_or_make("things", "digest", "thing", make))
    assert make.calls == 2
    assert same(load_or_make("things", "digest", "thing", make))
    assert make.calls == 2


def test_a_cache_that_cannot_be_written_costs_only_time(cache: Path) -> None:
    cache.write_text("a file, where a folder is needed")
    make = Maker()
    assert same(load_or_make("things", "digest", "thing", make))
    assert make.calls == 1


def test_two_that_want_the_same_make_it_once(cache: Path) -> None:
    make = Maker()
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: same(load_or_make("things", "digest", "thing", make)), range(8)))
    assert make.calls == 1


def test_an_error_of_the_maker_is_passed_on(cache: Path) -> None:
    def fail() -> dict[str, torch.Tensor]:
        raise NumericalError("singular")

    with pytest.raises(NumericalError):
        load_or_make("things", "digest", "thing", fail)
    assert same(load_or_make("things", "digest", "thing", Maker()))
