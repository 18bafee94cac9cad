from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

IGNORE = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")


def pip(*arguments: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """The wheel of kecore."""
    return built(tmp_path_factory, root, KECORE_BUILD_NATIVE="")


@pytest.fixture(scope="session")
def native_wheel(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """The wheel that is compiled ahead of time."""
    return built(tmp_path_factory, root, KECORE_BUILD_NATIVE="1")


def built(tmp_path_factory: pytest.TempPathFactory, root: Path, **environment: str) -> Path:
    """A wheel built from a copy: a build in place would leave stale files for the next one."""
    source = tmp_path_factory.mktemp("source")
    for name in ("kecore", "plugins", "csrc"):
        if (root / name).is_dir():
            shutil.copytree(root / name, source / name, ignore=IGNORE)
    shutil.copytree(root / "docs" / "errors", source / "docs" / "errors", ignore=IGNORE)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source), **environment)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def hello_site(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A directory into which plugins/kecore-hello is installed as its users would."""
    source = tmp_path_factory.mktemp("hello") / "kecore-hello"
    shutil.copytree(root / "plugins" / "kecore-hello", source, ignore=IGNORE)
    site = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-build-isolation", "--target", str(site), str(source))
    return site
