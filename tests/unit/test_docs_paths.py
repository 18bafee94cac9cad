"""Paths and names on the pages that lead a reader through the tree exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "docs/memit-line-by-line.md",
    "docs/concepts.md",
    "docs/design/0005-the-house.md",
    "csrc/README.md",
    "CONTRIBUTING.md",
)
WALK = "docs/memit-line-by-line.md"

_QUOTED = re.compile(r"`([^`\n]+)`")
_TREES = ("kecore/", "plugins/", "csrc/", "docs/", "tests/", "benchmarks/", "recipes/")
_KERNELS = ("kernels/", "binding/", "emulator/")  # relative to csrc/README.md


def quoted(page: str) -> list[str]:
    """Return what stands in backquotes, outside blocks of code."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return _QUOTED.findall(text)


def path_of(words: str, page: str) -> Path | None:
    """Return the path that the words are, or None where they are none; NAME stands for a name to come."""
    if "NAME" in words or not re.fullmatch(r"[\w./*{},-]+", words):
        return None
    if words.startswith(_TREES) or words.startswith(("setup.py", "CMakeLists.txt")):
        return ROOT / words
    if page == "csrc/README.md" and words.startswith(_KERNELS):
        return ROOT / "csrc" / words
    return None


def missing_paths(page: str) -> list[str]:
    missing: list[str] = []
    for words in quoted(page):
        path = path_of(words, page)
        if path is None or "{" in words:
            continue
        if not path.exists() and not list(ROOT.glob(str(path.relative_to(ROOT)))):
            missing.append(words)
    return missing


def names_of(file: Path) -> set[str]:
    """Return the names that a Python file defines, those inside classes with the class's name before them."""
    names: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return names


def missing_names(page: str) -> tuple[int, list[str]]:
    """Check each name that follows a file: how many there are, and those that the file does not define."""
    count = 0
    missing: list[str] = []
    file: Path | None = None
    for words in quoted(page):
        path = path_of(words, page)
        if path is not None:
            file = path if path.is_file() else None
        elif file is not None and re.fullmatch(r"[A-Za-z_][\w.]*", words) and not words.isupper():
            count += 1
            text = file.read_text(encoding="utf-8")
            known = words in names_of(file) if file.suffix == ".py" else words in text
            if not known:
                missing.append(f"{file.relative_to(ROOT)}: {words}")
    return count, missing


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists(page: str) -> None:
    assert not missing_paths(page)


def test_every_function_of_the_walk_exists() -> None:
    count, missing = missing_names(WALK)
    assert not missing
    assert count >= 35  # the pattern still finds them


def test_the_test_notices_what_is_missing(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("`kecore/files.py` `write_tensors`, `no_such_name`, `kecore/no_such_file.py`", encoding="utf-8")
    assert missing_paths(str(page)) == ["kecore/no_such_file.py"]
    assert missing_names(str(page)) == (2, ["kecore/files.py: no_such_name"])
