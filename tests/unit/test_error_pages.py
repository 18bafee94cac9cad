"""Each error has a page that explains it, and each page an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from kecore.api import errors

PAGES = Path(__file__).resolve().parents[2] / "docs" / "errors"


def test_every_page_has_its_class() -> None:
    assert {page.stem for page in PAGES.glob("*.md")} == set(errors.__all__)


@pytest.mark.parametrize("name", errors.__all__)
def test_page_follows_the_form(name: str) -> None:
    lines = (PAGES / f"{name}.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"# {name}"
    for part in ("**Symptom.**", "**Cause.**", "**Triggers.**", "**Fix.**"):
        assert sum(line.startswith(part) for line in lines) == 1, part
    bases = [base.__name__ for base in getattr(errors, name).__bases__]
    assert all(f"`{base}`" in lines[2] for base in bases), f"name the bases {bases}"
