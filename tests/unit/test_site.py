"""The documentation site: links that hold on a code host and on the site, and a check that finds the broken ones.

``make docs`` builds the whole site, which CI does too; here is what that build relies on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def site(docs_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, root: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "docs"))
    return docs_script("_site")


def test_drawings_are_current(docs_script: Callable[[str], ModuleType]) -> None:
    for file, text in docs_script("_drawings").drawings().items():
        assert file.read_text(encoding="utf-8") == text, "run `python docs/_drawings.py`"


def test_every_page_has_a_place_in_the_navigation(site: ModuleType, tmp_path: Path) -> None:
    site.PREPARED = tmp_path
    config = site.prepare()
    assert {file.relative_to(tmp_path / "pages").as_posix() for file in (tmp_path / "pages").rglob("*.md")} >= {
        "index.md",
        "api/kecore.editor.md",
        "errors/index.md",
        "changelog.md",
        "methods/memit.md",
    }
    assert "/*" not in config.read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match=r"no place for new\.md"):
        site.expand(["index.md"], ["index.md", "new.md"])


@pytest.mark.parametrize(
    ("page", "line", "expected"),
    [
        ("index.md", "see `docs/errors/`", "see [Errors](errors/index.md)"),
        ("methods/memit.md", "see `docs/gotchas.md`, too", "see [Gotchas](../gotchas.md), too"),
        ("methods/memit.md", "[a](../gotchas.md#b)", "[a](../gotchas.md#b)"),
        ("metrics.md", "[the sample](../kecore/data/README.md)", "[the sample](wikipedia-sample.md)"),
        ("wikipedia-sample.md", "[m](../../docs/metrics.md#a)", "[m](metrics.md#a)"),
        ("metrics.md", "[a recipe](../recipes/knowedit.yaml)", "a recipe"),
        ("metrics.md", "[gone](gone.md) `docs/gone.md`", "[gone](gone.md) `docs/gone.md`"),
        ("metrics.md", "![picture](evaluate_small.png)", "![picture](evaluate_small.png)"),
        ("metrics.md", "`docs/metrics.md`", "`docs/metrics.md`"),
        ("metrics.md", "```\n`docs/gotchas.md`\n```", "```\n`docs/gotchas.md`\n```"),
    ],
)
def test_links_are_those_of_the_site(site: ModuleType, page: str, line: str, expected: str) -> None:
    pages = {
        "index.md": "# kecore\n",
        "errors/index.md": "# Errors\n",
        "gotchas.md": "# Gotchas\n\nText.\n",
        "metrics.md": "# Metrics\n",
        "methods/memit.md": "# MEMIT\n",
    }
    assert site.relink(line, page, pages) == expected


def test_broken_links_are_found(docs_script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(
        '<h1 id="top">x</h1><a href="#top">a</a><a href="#none">b</a><a href="other.html#place">c</a>'
        '<a href="missing.html">d</a><a href="https://example.org">e</a><script src="https://example.org/x.js"></script>'
        '<link rel="canonical" href="https://example.org/"><img src="missing.png"><a href="folder/">f</a>',
        encoding="utf-8",
    )
    (tmp_path / "other.html").write_text('<p id="place"></p><a href="/index.html">g</a>', encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "index.html").write_text('<a href="../other.html#no%20place">h</a>', encoding="utf-8")
    assert sorted(docs_script("_linkcheck").problems(tmp_path)) == [
        "folder/index.html links to ../other.html#no%20place, whose page has no such place",
        "index.html links to #none, whose page has no such place",
        "index.html links to missing.html, which is not there",
        "index.html loads https://example.org/x.js; a page has to work without the network",
        "index.html loads missing.png, which is not there",
    ]
