"""Builds the kernels with CMake and runs their C++ tests, each CTest as a test of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "native"
MISSING = [tool for tool in ("cmake", "ctest", "g++", "make") if shutil.which(tool) is None]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each that ctest lists; configuring, which makes that list, takes a second."""
    if "ctest_name" not in metafunc.fixturenames:
        return
    names: list[Any] = []
    if MISSING:
        names = [pytest.param("", marks=pytest.mark.skip(reason=f"not installed: {', '.join(MISSING)}"), id="none")]
    else:
        BUILD.parent.mkdir(exist_ok=True)
        # Each worker of pytest-xdist collects; two that configure at once spoil it for each other.
        with FileLock(BUILD.parent / "native.lock"):
            if run("cmake", "-S", ROOT, "-B", BUILD).returncode == 0:
                listed = run("ctest", "--test-dir", BUILD, "--show-only=json-v1")
                names = [test["name"] for test in json.loads(listed.stdout[listed.stdout.index("{") :])["tests"]]
    metafunc.parametrize("ctest_name", names or [pytest.param("", id="not-configured")])


@pytest.fixture(scope="module")
def built() -> None:
    for command in (("cmake", "-S", ROOT, "-B", BUILD), ("cmake", "--build", BUILD)):
        done = run(*command)
        assert done.returncode == 0, done.stdout[-4000:]


def test_native(built: None, ctest_name: str) -> None:
    pattern = f"^{ctest_name.replace('.', '[.]')}$"
    done = run("ctest", "--test-dir", BUILD, "-R", pattern, "--output-on-failure", "--no-tests=error")
    if "***Skipped" in done.stdout:
        pytest.skip("this machine has a GPU; only one without can show the refusal")
    assert done.returncode == 0, done.stdout[-4000:]
