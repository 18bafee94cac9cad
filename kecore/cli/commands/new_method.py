"""``kecore new-method``: a package with a method to start from, its project file and its test."""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

import kecore
from kecore.api.errors import ConfigError
from kecore.cli import options
from kecore.cli.console import Screen, make_fields

__all__ = ["Names", "make_files", "new_method"]

_PROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{distribution}"
version = "0.1.0"
description = "An editing method for kecore"
requires-python = ">=3.10"
dependencies = ["kecore"]

[project.optional-dependencies]
test = ["pytest>=8"]

# These lines are all it takes to be found.
[project.entry-points."kecore.methods"]
{name} = "{module}:{cls}"

[tool.setuptools]
py-modules = ["{module}"]
"""


@dataclass(frozen=True, slots=True)
class Names:
    """The names of a new method and of what is around it.

    Args:
        name: what users type, such as ``my-method``.
    """

    name: str

    @classmethod
    def of(cls, text: str) -> Names:
        """Read a name.

        Raises:
            ConfigError: it is no name, or that of an installed method.
        """
        from kecore.api.registry import default_registry

        name = text.strip().lower().replace("_", "-")
        words = name.split("-")
        if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or keyword.iskeyword(name):
            raise ConfigError(f"'{text}' cannot name a method; take letters, digits and hyphens, such as my-method")
        if name in default_registry():
            raise ConfigError(f"there is a method '{'-'.join(words)}' already; choose another name")
        return cls(name)

    @property
    def distribution(self) -> str:
        """The name of the package for pip."""
        return f"kecore-{self.name}"

    @property
    def module(self) -> str:
        """The name of the Python module."""
        return self.distribution.replace("-", "_")

    @property
    def cls(self) -> str:
        """The name of the class."""
        return "".join(word.capitalize() for word in self.name.split("-"))


def new_method(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="What users will type, such as my-method.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory for the package.", show_default="kecore-NAME")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Write a package with a method that works, to make your own of it.

    The method, its pyproject.toml, and a test that runs the conformance kit; docs/write-a-method.md explains them.
    """
    screen = Screen.of(context)
    from kecore.files import check_new_folder, write_folder

    names = Names.of(name)
    folder = out or Path(names.distribution)
    check_new_folder(folder)
    files = make_files(names)
    with write_folder(folder) as temporary:
        for file, text in files.items():
            (temporary / file).write_text(text, encoding="utf-8")
    screen.show(make_fields({"written": str(folder), "files": ", ".join(files)}))
    # Without a slash pip would look for a package of that name in its index.
    place = quote(str(folder) if folder.is_absolute() else f"./{folder}")
    screen.commands(
        "Next",
        f"kecore edit demo --method {place}/{names.module}.py:{names.cls} --facts FILE --out my-edit",
        f"python -m pytest {place} -k gpt2  # a quick part of the kit; all of it without -k",
        f"pip install {place}  # then --method {names.name}",
    )
    screen.finish({"folder": folder, "files": list(files), "method": names.name, "class": names.cls})


def make_files(names: Names) -> dict[str, str]:
    """Return the files of the package by name: those of the tutorial's method, under the new names."""
    project = _PROJECT.format(
        distribution=names.distribution, name=names.name, module=names.module, cls=names.cls
    )  # fmt: skip
    return {
        "pyproject.toml": project,
        f"{names.module}.py": _rename(_read_tutorial("kecore_hello.py"), names),
        f"test_{names.module}.py": _rename(_read_tutorial("test_kecore_hello.py"), names),
    }


def _rename(text: str, names: Names) -> str:
    text = text.replace("kecore_hello", names.module).replace("Hello", names.cls)
    return text.replace('"hello"', f'"{names.name}"')


def _read_tutorial(file: str) -> str:
    """Return a file of the tutorial's method: inside an installed package, or beside it in a checkout."""
    package = Path(kecore.__file__).resolve().parent
    installed = package / "_tutorial"
    folder = installed if installed.is_dir() else package.parent / "plugins" / "kecore-hello"
    return (folder / file).read_text(encoding="utf-8")
