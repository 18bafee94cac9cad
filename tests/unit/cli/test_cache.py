"""``kecore cache``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("KECORE_CACHE", str(folder))
    for name, size in (("models", 3000), ("factors/deep", 500), ("factors", 24)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "file").write_bytes(b"0" * size)
    return folder


def test_what_is_kept_and_how_large(kecore: Run, cache: Path) -> None:
    text = " ".join(kecore("cache").stdout.split())
    assert "models models unpacked from .gguf files 2.9 KiB" in text
    assert "all 3.4 KiB" in text
    assert json.loads(kecore("cache", "--json").stdout)["bytes"] == {"factors": 524, "models": 3000}


def test_folders_are_cleared(kecore: Run, cache: Path) -> None:
    assert json.loads(kecore("cache", "--clear", "factors", "--json").stdout)["freed"] == 524
    assert sorted(path.name for path in cache.iterdir()) == ["models"]
    done = kecore("cache", "--clear", "models", "--clear", "statistics")
    assert done.exit_code == 2
    assert "has no folder 'statistics'; it has: models, all" in done.stderr
    assert (cache / "models" / "file").is_file()
    assert "deleted: 2.9 KiB" in kecore("cache", "--clear", "all").stdout
    assert list(cache.iterdir()) == []


def test_a_cache_that_is_not_there(kecore: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KECORE_CACHE", str(tmp_path / "none"))
    assert json.loads(kecore("cache", "--json").stdout)["bytes"] == {}
    assert not (tmp_path / "none").exists()
