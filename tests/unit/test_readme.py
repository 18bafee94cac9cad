"""README.md says what is true."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def test_table_of_methods_is_current(root: Path) -> None:
    spec = importlib.util.spec_from_file_location("kecore_docs_methods", root / "docs" / "_methods.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run `python docs/_methods.py`"


def test_both_commands_are_those_of_ci(root: Path) -> None:
    readme, ci = ((root / name).read_text(encoding="utf-8") for name in ("README.md", ".ci/run"))
    for command in ("make demo", "make test"):
        assert command in readme
        assert command in ci
