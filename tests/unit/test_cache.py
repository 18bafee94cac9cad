"""The cache keeps its bound: what was used least recently goes, what is in use stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from kecore.api.errors import ConfigError
from kecore.cache import BOUND, cache_bound, mark_used, trim_cache


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four entries of 1000 bytes, used 5, 4, 3 and 0 hours ago; the third is a folder."""
    now = time.time()
    for hours, name in ((5, "factors/a"), (4, "factors/b"), (3, "models/c"), (0, "statistics/d")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path
        if name == "models/c":
            path.mkdir()
            file = path / "weights"
        file.write_bytes(b"0" * 1000)
        os.utime(path, (now - 3600 * hours,) * 2)
    (tmp_path / "factors" / "a.lock").touch()
    return tmp_path


def entries(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("*/*") if path.suffix != ".lock")


@pytest.mark.parametrize(
    ("bound", "freed", "kept"),
    [("4000", 0, "abcd"), ("3999", 1000, "bcd"), ("2000", 2000, "cd"), ("1", 3000, "d")],
)
def test_least_recently_used_goes_first(
    root: Path, monkeypatch: pytest.MonkeyPatch, bound: str, freed: int, kept: str
) -> None:
    monkeypatch.setenv(BOUND, bound)
    assert trim_cache(root) == freed
    assert entries(root) == list(kept)
    assert (root / "factors" / "a.lock").exists()


def test_what_is_used_stays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BOUND, "2000")
    mark_used(root / "factors" / "a")
    assert trim_cache(root) == 2000
    assert entries(root) == ["a", "d"]
    mark_used(root / "not there")


def test_bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(BOUND, raising=False)
    assert cache_bound() == 20 << 30
    monkeypatch.setenv(BOUND, "1.5 GiB")
    assert cache_bound() == 3 << 29
    monkeypatch.setenv(BOUND, "much")
    with pytest.raises(ConfigError, match="KECORE_CACHE_SIZE must be a size such as 500MiB or 50GiB, got 'much'"):
        cache_bound()
    monkeypatch.setenv(BOUND, "1")
    assert trim_cache(tmp_path / "nothing there") == 0
