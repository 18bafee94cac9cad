"""What `pip install kecore` brings."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path

import pytest

from kecore._version import __version__

NATIVE = {".h", ".cuh", ".cpp", ".cu"}


@pytest.fixture(scope="module")
def contents(wheel: Path) -> dict[str, str]:
    """The wheel's files by name, as text where they are text."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name).decode("utf-8", "replace") for name in archive.namelist()}


def part(contents: dict[str, str], suffix: str) -> str:
    (name,) = [name for name in contents if name.endswith(suffix)]
    return contents[name]


def files(folder: Path, prefix: str) -> set[str]:
    found = (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {f"{prefix}/{file.relative_to(folder).as_posix()}" for file in found}


def test_holds_all_packages_whole_and_nothing_else(contents: dict[str, str], root: Path) -> None:
    expected = files(root / "kecore", "kecore")
    for package in (path.name for path in (root / "plugins").glob("kecore_*")):
        expected |= files(root / "plugins" / package, package)
    assert {"kecore/py.typed", "kecore/data/counterfact_sample.jsonl"} <= expected
    elsewhere = ("kecore/_csrc/", "kecore/_errors/", "kecore/_tutorial/", "kecore-")
    found = {name for name in contents if not name.startswith(elsewhere)}
    assert found == expected


def test_holds_the_pages_of_errors(contents: dict[str, str], root: Path) -> None:
    expected = files(root / "docs" / "errors", "kecore/_errors")
    assert expected == {name for name in contents if name.startswith("kecore/_errors/")}


def test_holds_the_method_that_new_ones_are_made_of(contents: dict[str, str], root: Path) -> None:
    expected = {name for name in files(root / "plugins" / "kecore-hello", "kecore/_tutorial") if name.endswith(".py")}
    assert expected == {name for name in contents if name.startswith("kecore/_tutorial/")}


def test_holds_native_sources(contents: dict[str, str], root: Path) -> None:
    if not (root / "csrc").is_dir():
        pytest.skip("there is no native code yet")
    expected = {name for name in files(root / "csrc", "kecore/_csrc") if Path(name).suffix in NATIVE}
    assert expected == {name for name in contents if name.startswith("kecore/_csrc/")}


def test_metadata(contents: dict[str, str]) -> None:
    head = message_from_string(part(contents, ".dist-info/METADATA"))
    assert (head["Name"], head["Version"]) == ("kecore", __version__)
    assert head["License-Expression"] == "Apache-2.0"
    assert "Apache License" in part(contents, "licenses/LICENSE")
    needs = head.get_all("Requires-Dist") or []
    required = {need.split(";")[0].split(">")[0].strip() for need in needs if "extra ==" not in need}
    assert required == {
        "filelock",
        "huggingface_hub",
        "numpy",
        "pydantic",
        "pyyaml",
        "rich",
        "tqdm",
        "safetensors",
        "tomli",
        "torch",
        "transformers",
        "typer",
    }
    for extra in head.get_all("Provides-Extra") or []:
        assert any(f"extra == '{extra}'" in n or f'extra == "{extra}"' in n for n in needs), f"[{extra}] is empty"


def test_entry_points_lead_to_files_of_the_wheel(contents: dict[str, str]) -> None:
    parser = ConfigParser()
    parser.read_string(part(contents, "entry_points.txt"))
    assert dict(parser["console_scripts"]) == {"kecore": "kecore.cli:main"}
    assert {"rome", "memit", "emmet", "alphaedit", "ft-l", "ft-m"} <= set(parser["kecore.methods"])
    for section in parser.sections():
        for target in parser[section].values():
            module, _, name = target.partition(":")
            path = module.replace(".", "/")
            file = contents.get(f"{path}.py") or contents.get(f"{path}/__init__.py")
            assert file, f"{target} leads to no file"
            assert name in file, f"{target} leads to no class"


def test_unpacked_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import kecore, kecore_methods; from kecore.api import registry; "
        f"assert kecore.__file__.startswith({str(site)!r}), kecore.__file__; "
        f"assert kecore_methods.__file__.startswith({str(site)!r}); "
        "assert not [m.error for m in registry.default_registry().describe() if m.error]; "
        f"assert kecore.__version__ == {__version__!r}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)})
