"""Checks a built site: every link leads to a page and a place that exist, and nothing is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
_NEVER_LOADED = ("canonical", "prev", "next", "alternate")


class _PageLinks(HTMLParser):
    """Reads what one page of HTML links to, what it loads, and the places in it that a link may name."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        address = values.get(_LOADS.get(tag, ""))
        if address is not None and values.get("rel") not in _NEVER_LOADED:
            self.loads.append(address)


def problems(site: Path) -> Iterator[str]:
    """Yield a sentence for each broken link of a built site, and for each resource that it loads from elsewhere."""
    pages = {file: _read(file) for file in sorted(site.rglob("*.html"))}
    for file, page in pages.items():
        name = file.relative_to(site)
        for address in page.loads:
            parts = urlsplit(address)
            if parts.netloc:
                yield f"{name} loads {address}; a page has to work without the network"
            elif parts.scheme == "" and parts.path and not _target(file, parts.path, site).is_file():
                yield f"{name} loads {address}, which is not there"
        if file.name == "404.html":
            continue  # its links are relative to wherever it is shown
        for address in page.links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = _target(file, parts.path, site) if parts.path else file
            if not target.is_file():
                yield f"{name} links to {address}, which is not there"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{name} links to {address}, whose page has no such place"


def _read(file: Path) -> _PageLinks:
    page = _PageLinks()
    page.feed(file.read_text(encoding="utf-8"))
    return page


def _target(file: Path, path: str, site: Path) -> Path:
    base = site / path.lstrip("/") if path.startswith("/") else file.parent / unquote(path)
    target = base.resolve()
    return target / "index.html" if target.is_dir() else target
