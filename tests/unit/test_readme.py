"""README.md and the tables of what was measured say what is true."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


def test_table_of_methods_is_current(docs_script: Callable[[str], ModuleType]) -> None:
    module = docs_script("_methods")
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run `python docs/_methods.py`"


def test_links_lead_somewhere(root: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", (root / "README.md").read_text(encoding="utf-8"))
    assert len(links) >= 40
    assert [link for link in links if not (root / link).is_file()] == []


def test_what_was_measured_is_current(docs_script: Callable[[str], ModuleType]) -> None:
    pages = docs_script("_measured").pages()
    assert {path.stem for path in pages} >= {"results", "memit", "rome"}
    for path, page in pages.items():
        assert path.read_text(encoding="utf-8") == page, "run `python docs/_measured.py`"


def test_both_commands_are_those_of_ci(root: Path) -> None:
    readme, ci = ((root / name).read_text(encoding="utf-8") for name in ("README.md", ".ci/run"))
    for command in ("make demo", "make test"):
        assert command in readme
        assert command in ci
