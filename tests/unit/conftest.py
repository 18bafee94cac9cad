"""Fixtures: tiny models with three kinds of tokenizer, and commands run in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import engine_worlds
import pytest
from typer.testing import CliRunner

Run = Callable[..., Any]


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


@pytest.fixture
def kecore() -> Run:
    """``kecore("edit", "demo", ...)`` to the result with exit code, stdout and stderr."""
    from kecore.cli import app

    runner = CliRunner()
    return lambda *words, **options: runner.invoke(app, [str(word) for word in words], **options)


@pytest.fixture(params=["llama", "gpt2", "granite", "gemma2", "bart"])
def any_world(request: pytest.FixtureRequest) -> engine_worlds.World:
    """Also one with a scaled residual, one with a norm behind its blocks, and one without left padding."""
    return engine_worlds.make_world(request.param)
