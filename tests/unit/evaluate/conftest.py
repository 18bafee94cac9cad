"""Fixtures: tiny models with three kinds of tokenizer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

# pytest's importlib mode leaves sys.path alone; the helper modules beside this file are imported by name.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(params=["byte-level", "llama", "unigram"])
def world(request: pytest.FixtureRequest) -> Any:
    """Each tokenizer family in turn."""
    from tiny_worlds import make_world

    return make_world(request.param)


@pytest.fixture
def small() -> Any:
    """One world, where the tokenizer does not matter."""
    from tiny_worlds import make_world

    return make_world("byte-level")
