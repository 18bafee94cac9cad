"""The pages say what the commands say, and name only commands and options that there are."""

from __future__ import annotations

import ast
import doctest
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main

import kecore
from kecore.cli import app
from kecore.cli.options import spread_files
from kecore.testing.structure import PLUGINS


def test_command_page_is_current(docs_script: Callable[[str], ModuleType]) -> None:
    module = docs_script("_cli")
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run `python docs/_cli.py`"


def test_tables_of_side_effects_are_current(docs_script: Callable[[str], ModuleType]) -> None:
    module = docs_script("_side_effects")
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run `python docs/_side_effects.py`"


def test_page_of_published_set_ups_is_current(docs_script: Callable[[str], ModuleType]) -> None:
    module = docs_script("_fidelity")
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run `python docs/_fidelity.py`"


def test_the_example_of_a_paper_is_current(docs_script: Callable[[str], ModuleType]) -> None:
    module = docs_script("_paper")
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run `python docs/_paper.py`"


def shown(root: Path) -> list[str]:
    """Every kecore command in the blocks of the quickstart, the README and the pages on installing and evaluating."""
    pages = [*(root / "docs" / f"{name}.md" for name in ("quickstart", "install", "evaluate")), root / "README.md"]
    blocks = [block for page in pages for block in page.read_text(encoding="utf-8").split("```")[1::2]]
    lines = [line.removeprefix("$ ").partition("    #")[0] for block in blocks for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in re.split(r" [|] |; ", line)]
    return [part for part in parts if part.startswith("kecore ")]


def test_shown_commands_parse(root: Path) -> None:
    group: Any = typer.main.get_command(app)
    commands = shown(root)
    assert len(commands) > 8
    for command in commands:
        _, name, *words = shlex.split(command.partition(" 2>")[0])
        group.get_command(None, name).make_context(name, spread_files(words))


def test_quickstart_shows_outputs(docs_script: Callable[[str], ModuleType]) -> None:
    module = docs_script("_quickstart")
    text = module.PAGE.read_text(encoding="utf-8")
    assert module.refreshed(text, lambda command: f"ran {command}\n").count("\nran ") == len(module.commands(text))
    assert "taken off, both models have their first weights, bit for bit" in text


def test_refreshing_replaces_old_output(docs_script: Callable[[str], ModuleType]) -> None:
    text = "a\n```console\n$ x 1\nold\nold\n$ y\n```\nb\n```\n$ z\n```\n"
    found = docs_script("_quickstart").refreshed(text, lambda command: f"new {command}\n")
    assert found == "a\n```console\n$ x 1\nnew x 1\n\n$ y\nnew y\n```\nb\n```\n$ z\n```\n"


def imports_of_a_page(page: Path) -> list[ast.ImportFrom]:
    """The imports of kecore's names in the blocks of Python on a page."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    imports = [node for node in ast.walk(ast.parse("\n".join(blocks))) if isinstance(node, ast.ImportFrom)]
    return [node for node in imports if (node.module or "").partition(".")[0] in ("kecore", *PLUGINS)]


def test_pages_import_names_that_exist(root: Path) -> None:
    checked = 0
    for page in [root / "README.md", *(root / "docs").rglob("*.md")]:
        for node in imports_of_a_page(page):
            for alias in node.names:
                exec(f"from {node.module} import {alias.name}", {})  # noqa: S102 - a name of ours
                checked += 1
    assert checked > 30


def python_of_a_page(page: Path) -> str:
    """The first block of Python on a page."""
    _, _, rest = page.read_text(encoding="utf-8").partition("```python\n")
    return rest.partition("```")[0]


def python_of_the_package(_: Path) -> str:
    """The first example of the package, without its prompts."""
    return "".join(example.source for example in doctest.DocTestParser().get_examples(kecore.__doc__ or ""))


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize(
    ("read", "page", "folder"),
    [
        (python_of_the_package, "kecore/__init__.py", "paris"),
        (python_of_a_page, "README.md", "eiffel"),
        (python_of_a_page, "docs/quickstart.md", "eiffel"),
    ],
)
def test_python_that_is_shown_runs(
    read: Callable[[Path], str],
    page: str,
    folder: str,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kecore import models

    if models.demo_file() is None:
        pytest.skip(models.DEMO_MISSING)
    monkeypatch.chdir(tmp_path)
    exec(read(root / page), {})  # noqa: S102 - the page's own code
    assert (tmp_path / folder / "edit.safetensors").is_file()
