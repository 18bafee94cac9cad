"""Builds the documentation site into out/docs/html: ``make docs``.

Pages are written for a code host, where a link may lead to any file and a path in backquotes is enough. This script
writes them down once more, into out/docs, with links to the pages of the site, beside the pages that are made of other
files (the Python reference, lists of methods, errors and decisions). Then it runs the builder, which stops at a
warning, and checks every link of what was built.
"""

from __future__ import annotations

import ast
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _linkcheck
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PREPARED = ROOT / "out" / "docs"
SITE = PREPARED / "html"
_ASSETS = (".css", ".js", ".png", ".svg")

# Files outside docs/ that are pages of the site too: where they lie, and where they stand on the site.
COPIES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "csrc/README.md": "csrc.md",
    "kecore/data/README.md": "wikipedia-sample.md",
}
# Paths that the pages name, and the page of the site that tells the same.
_ALIASES = {
    "README.md": "index.md",
    "docs": "index.md",
    "docs/methods": "methods/index.md",
    "docs/errors": "errors/index.md",
    "docs/design": "design/index.md",
    **COPIES,
}
_SOURCES = {page: path for path, page in COPIES.items()}

# The packages whose modules are documented, beside the modules of kecore itself; commands have a page of their own.
_PACKAGES = ("api", "edit", "model", "engine", "statistics", "inference", "evaluate", "ops", "serving", "testing")

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
_PATH_IN_CODE = re.compile(r"(?<![\[`])`((?:docs|csrc|kecore/data)(?:/[\w.-]+)*/?|[A-Z]+\.md)`(?![`\]])")
_FENCE = re.compile(r"\s*(```|~~~)")


def prepare() -> Path:
    """Write pages and configuration into out/docs, and return the configuration."""
    shutil.rmtree(PREPARED, ignore_errors=True)
    pages = read_pages()
    for name, text in pages.items():
        file = PREPARED / "pages" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(relink(text, name, pages), encoding="utf-8")
    for asset in DOCS.rglob("*"):
        if asset.suffix in _ASSETS:
            copy = PREPARED / "pages" / asset.relative_to(DOCS)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(asset, copy)
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    config |= {"docs_dir": "pages", "site_dir": SITE.name, "nav": expand(config["nav"], sorted(pages))}
    python = next(plugin["mkdocstrings"] for plugin in config["plugins"] if "mkdocstrings" in plugin)
    python["handlers"]["python"]["paths"] = [str(ROOT), str(ROOT / "plugins")]
    python["handlers"]["python"]["options"]["extensions"] = [str(DOCS / "_roles.py")]
    file = PREPARED / "mkdocs.yml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return file


def read_pages() -> dict[str, str]:
    """Return the Markdown of every page by its place on the site, with links as they are for a code host."""
    pages = {file.relative_to(DOCS).as_posix(): file.read_text(encoding="utf-8") for file in DOCS.rglob("*.md")}
    pages |= {page: (ROOT / path).read_text(encoding="utf-8") for path, page in COPIES.items()}
    pages["methods/index.md"] = _list_methods()
    pages["errors/index.md"] = _list_pages(
        "Errors", "Every error of kecore is typed and says what to do. `kecore explain NAME` prints its page.", "errors"
    )
    pages["design/index.md"] = _list_pages("Decisions", "What was decided about the design, and why.", "design")
    modules = dict(_modules())
    for module in modules:
        pages[f"api/{module}.md"] = f"# `{module}`\n\n::: {module}\n"
    pages["api/index.md"] = _list_modules(modules)
    return pages


def relink(text: str, page: str, pages: dict[str, str]) -> str:
    """Return the text of a page with links, and paths in backquotes, that lead to the pages of the site."""
    lines: list[str] = []
    fenced = False
    for line in text.split("\n"):
        if _FENCE.match(line):
            fenced = not fenced
        lines.append(line if fenced else _relink_line(line, page, pages))
    return "\n".join(lines)


def _relink_line(line: str, page: str, pages: dict[str, str]) -> str:
    def follow(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        source = _SOURCES.get(page, f"docs/{page}")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        shown = _page_of(path, pages)
        if shown is not None:
            return f"[{text}]({_relative(shown, page)}{anchor})"
        if (ROOT / path).exists() and not path.startswith("docs/"):
            return text  # a file of the repository that the site does not show
        return match[0]

    def name(match: re.Match[str]) -> str:
        shown = _page_of(match[1].rstrip("/"), pages)
        if shown is None or shown == page:
            return match[0]
        heading = re.sub(r"^# +", "", pages[shown].lstrip().split("\n", 1)[0]).strip()
        return f"[{heading}]({_relative(shown, page)})"

    return _PATH_IN_CODE.sub(name, _LINK.sub(follow, line))


def _page_of(path: str, pages: dict[str, str]) -> str | None:
    """Return the page of the site that shows a path of the repository."""
    if path in _ALIASES:
        return _ALIASES[path]
    page = path.removeprefix("docs/")
    return page if path.startswith("docs/") and page in pages else None


def _relative(target: str, page: str) -> str:
    return posixpath.relpath(target, posixpath.dirname(page) or ".")


def expand(nav: list[Any], pages: list[str]) -> list[Any]:
    """Return the navigation with each entry ``FOLDER/*`` replaced by the pages of the folder that it does not name.

    Raises:
        SystemExit: a page stands nowhere in the navigation.
    """
    named = set(_named(nav))
    expanded = _expand(nav, [page for page in pages if page not in named])
    if missing := set(pages) - set(_named(expanded)):
        raise SystemExit(f"mkdocs.yml: the navigation has no place for {', '.join(sorted(missing))}")
    return expanded


def _expand(nav: list[Any], unnamed: list[str]) -> list[Any]:
    entries: list[Any] = []
    for entry in nav:
        if isinstance(entry, dict):
            ((title, inner),) = entry.items()
            entries.append({title: _expand(inner, unnamed) if isinstance(inner, list) else inner})
        elif entry.endswith("/*"):
            entries += [page for page in unnamed if posixpath.dirname(page) == entry[:-2]]
        else:
            entries.append(entry)
    return entries


def _named(nav: list[Any] | str) -> Iterator[str]:
    """Yield the pages that a navigation names."""
    if isinstance(nav, str):
        yield nav
        return
    for entry in nav:
        yield from _named(next(iter(entry.values())) if isinstance(entry, dict) else entry)


def _list_methods() -> str:
    """Make the page of all methods from the table in README.md."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("\n## Methods\n")[1].split("\n## ")[0]
    return "# Methods\n" + section.replace("](docs/methods/", "](")


def _list_pages(title: str, text: str, folder: str) -> str:
    """Make a page that lists the pages of a folder with their headings and first sentences."""
    lines = [f"# {title}\n", f"{text}\n", "| page | |", "| --- | --- |"]
    for file in sorted((DOCS / folder).glob("*.md")):
        heading, _, rest = file.read_text(encoding="utf-8").partition("\n")
        first_paragraph = " ".join(rest.strip().split("\n\n")[0].split())
        sentences = re.split(r"(?<=[.!?])\s", first_paragraph)
        lines.append(f"| [{heading.lstrip('# ')}]({file.name}) | {' '.join(sentences[:2])} |")
    return "\n".join(lines) + "\n"


def _modules() -> Iterator[tuple[str, str]]:
    """Yield each public module of the core, and the first line of its docstring."""
    package = ROOT / "kecore"
    files = [file for file in sorted(package.glob("*.py")) if not file.name.startswith("_")]
    for name in _PACKAGES:
        files += sorted((package / name).glob("*.py"))
    for file in files:
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        yield module, docstring.split("\n")[0]


def _list_modules(modules: dict[str, str]) -> str:
    """Make the first page of the Python reference: what ``kecore`` exports, and all modules."""
    from kecore import _HOME  # where each exported name is defined

    lines = ["# Python\n", "What `from kecore import ...` gives; each name loads when first used.\n"]
    lines += ["| name | from |", "| --- | --- |"]
    lines += [f"| `{name}` | [`{module}`]({module}.md) |" for name, module in sorted(_HOME.items())]
    lines += ["\n## Modules\n", "| module | |", "| --- | --- |"]
    lines += [f"| [`{module}`]({module}.md) | {summary} |" for module, summary in modules.items()]
    return "\n".join(lines) + "\n"


def build(config: Path) -> None:
    """Run the builder, and check what it built.

    Raises:
        SystemExit: the builder failed or warned, or a link leads nowhere.
    """
    shutil.rmtree(SITE, ignore_errors=True)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(config)]
    if code := subprocess.run(command, check=False).returncode:
        raise SystemExit(code)
    if problems := sorted(_linkcheck.problems(SITE)):
        raise SystemExit("\n".join([*problems, f"{len(problems)} broken links"]))


if __name__ == "__main__":
    build(prepare())
