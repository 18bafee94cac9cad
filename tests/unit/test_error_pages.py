"""Each error has a page that explains it, and each page an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from kecore.api import errors, pages
from kecore.api.errors import ConfigError
from kecore.api.pages import error_page, web_address

PAGES = Path(__file__).resolve().parents[2] / "docs" / "errors"


def test_every_page_has_its_class() -> None:
    assert {page.stem for page in PAGES.glob("*.md")} == set(errors.__all__)


@pytest.mark.parametrize("name", errors.__all__)
def test_page_follows_the_form(name: str) -> None:
    lines = (PAGES / f"{name}.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"# {name}"
    for part in ("**Symptom.**", "**Cause.**", "**Triggers.**", "**Fix.**"):
        assert sum(line.startswith(part) for line in lines) == 1, part
    assert error_page(name.lower()) == "\n".join(lines) + "\n"
    bases = [base.__name__ for base in getattr(errors, name).__bases__]
    assert all(f"`{base}`" in lines[2] for base in bases), f"name the bases {bases}"


def test_explain(kecore: Callable[..., Any]) -> None:
    shown = kecore("explain", "StorageError")
    assert shown.exit_code == 0
    assert "a full disk or a spent quota" in shown.stdout
    values = json.loads(kecore("explain", "storageerror", "--json").stdout)
    assert (values["error"], values["page"]) == ("StorageError", error_page("StorageError"))
    near = kecore("explain", "StorgeEror")
    assert near.exit_code == 2
    assert "did you mean StorageError" in near.stderr
    with pytest.raises(ConfigError, match="kecore has no error 'x'; known: "):
        error_page("x")


def test_address_stands_in_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    assert web_address("ConfigError") == ""
    message = Message()
    message["Project-URL"] = "Source, https://example.org/source"
    message["Project-URL"] = "Documentation, https://example.org/docs/"
    monkeypatch.setattr(pages, "metadata", lambda _: message)
    assert web_address("ConfigError") == "https://example.org/docs/errors/ConfigError.html"
