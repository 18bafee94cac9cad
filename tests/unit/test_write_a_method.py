"""docs/write-a-method.md shows the files of plugins/kecore-hello and the checks that there are."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from kecore.cli.commands.new_method import Names, make_files
from kecore.testing import Trial

HELLO = Path("plugins", "kecore-hello")


@pytest.fixture
def text(root: Path) -> str:
    return (root / "docs" / "write-a-method.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def test_blocks_are_the_files(root: Path, text: str) -> None:
    *method, test = blocks(text, "python")
    assert lines("\n".join(method)) == lines((root / HELLO / "kecore_hello.py").read_text(encoding="utf-8"))
    assert test == (root / HELLO / "test_kecore_hello.py").read_text(encoding="utf-8")
    (project,) = blocks(text, "toml")
    assert project == make_files(Names("hello"))["pyproject.toml"]
    shipped = (root / HELLO / "pyproject.toml").read_text(encoding="utf-8")
    assert 'hello = "kecore_hello:Hello"' in shipped
    assert 'name = "kecore-hello"' in shipped


def test_the_example_of_a_trial_names_its_fields(text: str) -> None:
    (trial,) = re.findall(r"Trial\(\n(.*?)^    \)$", text, flags=re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"(\w+)=", trial)) == set(Trial.__dataclass_fields__) - {"method"}


def test_table_of_checks_is_current(docs_script: Callable[[str], ModuleType]) -> None:
    module = docs_script("_checks")
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run `python docs/_checks.py`"
