"""The server under many clients while it is edited; the short form of benchmarks/serve_load.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def script(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_load", root / "benchmarks" / "serve_load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_load"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_no_request_fails_and_every_answer_is_of_one_state(script: ModuleType) -> None:
    figures = script.main("tiny", clients=24, seconds=3, tokens=6, pause=0.02)
    assert figures["failures"] == []
    assert figures["answers of another state"] == 0, figures["examples"]
    assert figures["requests"] >= 24
    assert figures["states"] > 1
    assert sum(figures["edits"].values()) >= 2
    assert figures["ratio"] > 1.5  # about 9 on a machine with nothing else to do
