"""``kecore new-method`` writes a package that works as it stands."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kecore.api.external import load_method
from kecore.cli.commands.new_method import Names
from kecore.testing.conformance import cases

Run = Callable[..., Any]


def test_the_package_installs_and_its_method_keeps_the_contract(kecore: Run, tmp_path: Path) -> None:
    folder = tmp_path / "kecore-my-method"
    done = kecore("new-method", "my_method", "--out", folder)
    assert done.exit_code == 0, done.output
    assert f"pip install {folder}" in " ".join(done.stdout.split())
    method = load_method(f"{folder}/kecore_my_method.py:MyMethod")
    assert method.name == "my-method"
    checks = {case.check.name: case for case in cases(method) if case.bench.architecture == "gpt2"}
    for name in ("class_fulfils_the_contract", "targets_become_likelier", "reverting_is_exact"):
        checks[name]()
    test = (folder / "test_kecore_my_method.py").read_text(encoding="utf-8")
    assert "from kecore_my_method import MyMethod" in test
    site = tmp_path / "site"
    words = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(site), str(folder)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    assert (site / "kecore_my_method.py").is_file()
    assert not (site / "test_kecore_my_method.py").exists()
    assert "my-method = kecore_my_method:MyMethod" in next(site.glob("*.dist-info/entry_points.txt")).read_text()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("MEMIT", "there is a method 'memit' already"),
        ("3d", "'3d' cannot name a method; take letters"),
        ("my method", "cannot name a method"),
        ("../x", "cannot name a method"),
        ("class", "cannot name a method"),
    ],
)
def test_bad_names(kecore: Run, tmp_path: Path, name: str, said: str) -> None:
    done = kecore("new-method", name, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_pip_is_told_a_path_and_not_a_name(kecore: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "pip install ./kecore-toy " in kecore("new-method", "toy").stdout


def test_nothing_is_overwritten(kecore: Run, tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    done = kecore("new-method", "mine", "--out", tmp_path)
    assert done.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_names() -> None:
    names = Names.of(" Two_Words ")
    assert (names.distribution, names.module, names.cls) == ("kecore-two-words", "kecore_two_words", "TwoWords")
