"""How values of options are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from kecore.api.errors import ConfigError
from kecore.cli.options import byte_count, layer_list, settings, spread_files


@pytest.mark.parametrize(
    ("text", "count"),
    [("1", 1), ("500MiB", 500 << 20), ("2GB", 2 << 30), ("4g", 4 << 30), (" 1.5 KiB ", 1536), ("7 bytes", None)],
)
def test_size(text: str, count: int | None) -> None:
    if count is None:
        with pytest.raises(ConfigError, match="--memory must be a size"):
            byte_count(text)
    else:
        assert byte_count(text) == count


def test_size_that_is_worked_out() -> None:
    assert byte_count(" auto") is None


@pytest.mark.parametrize("text", ["", "lots", "0", "-1", "GiB"])
def test_bad_size(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 500MiB"):
        byte_count(text)


@pytest.mark.parametrize(
    ("text", "layers"),
    [("auto", None), ("4", [4]), ("5,4", [4, 5]), ("4-8", [4, 5, 6, 7, 8]), ("0, 2-3,3", [0, 2, 3])],
)
def test_layers(text: str, layers: list[int] | None) -> None:
    assert layer_list(text) == layers


@pytest.mark.parametrize("text", ["", "four", "4;5", "-1", "4-", "5-4"])
def test_bad_layers(text: str) -> None:
    with pytest.raises(ConfigError, match="--layers"):
        layer_list(text)


def test_settings() -> None:
    pairs = ["layers=[4,5]", "learning-rate=0.5", "precision=bfloat16", "merge_subjects=false", "note=a=b"]
    assert settings(pairs) == {
        "layers": [4, 5],
        "learning_rate": 0.5,
        "precision": "bfloat16",
        "merge_subjects": False,
        "note": "a=b",
    }
    assert settings(None) == {}


@pytest.mark.parametrize(
    ("pairs", "said"), [(["steps"], "key=value"), (["=3"], "key=value"), (["a=1", "a=2"], "twice")]
)
def test_bad_settings(pairs: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings(pairs)


def test_several_texts_after_one_option(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "model.gguf"):
        (tmp_path / name).touch()
    a, b, gguf = (str(tmp_path / name) for name in ("a.txt", "b.txt", "model.gguf"))
    assert spread_files(["stats", "demo", "--text", a, b, "hf:wikitext", "--out", "x"]) == [
        "stats", "demo", "--text", a, "--text", b, "--text", "hf:wikitext", "--out", "x",
    ]  # fmt: skip
    # A model that is named after the texts stays a model, whatever kind of reference it is.
    for model in ("demo", str(tmp_path), gguf):
        assert spread_files(["stats", "--text", a, model]) == ["stats", "--text", a, model]
    assert spread_files(["stats", "--text"]) == ["stats", "--text"]
    assert spread_files(["edit", a, b, "--force", a]) == ["edit", a, b, "--force", a]
