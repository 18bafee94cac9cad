"""What every test stands on: offline, one thread, and the models and data that tests share."""

from __future__ import annotations

import importlib.util
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported
os.environ["KECORE_PLUGINS"] = ""  # what a developer has installed beside kecore must not change a result

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kecore import models
from kecore.testing.conformance import Case

# LAPACK with two threads on two busy cores can be 20 times slower than with one.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent

# pytest's importlib mode leaves sys.path alone; what tests share is imported by name from this folder.
sys.path.append(str(ROOT / "tests" / "support"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def docs_script() -> Callable[[str], ModuleType]:
    """``docs_script("_cli")``: a script of the documentation, as a module."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"kecore_docs{name}", ROOT / "docs" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """The demo model and its tokenizer, shared: a test that edits the model takes the edit off again."""
    if models.demo_file() is None:
        pytest.skip(models.DEMO_MISSING)
    loaded = models.load_model(models.DEMO, device="cpu")
    return loaded.model, loaded.tokenizer


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The field's benchmarks in their published layouts, where a checkout has them beside it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no benchmark data at {folder}")
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="run what can fail for a reason of its own: one case of each test, one method for each promise and kind "
        "of edit, nothing slow and no real model",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    chosen: dict[object, pytest.Item] = {}
    for item in items:
        if item.get_closest_marker("slow") is None and item.get_closest_marker("real_model") is None:
            chosen.setdefault(_reason(item), item)
    kept = set(chosen.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = chosen.values()


def _reason(item: pytest.Item) -> object:
    """Return what a test is alone with: its function, and of a conformance check the promise and the kind of edit."""
    function = item.nodeid.partition("[")[0]
    parameters: dict[str, object] = getattr(getattr(item, "callspec", None), "params", {})
    case = parameters.get("check")
    if isinstance(case, Case):
        return function, case.check.name, case.bench.capabilities.kind
    return function
