"""Running commands in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from kecore.cli import app

Run = Callable[..., Any]


@pytest.fixture
def kecore() -> Run:
    """``kecore("edit", "demo", ...)`` to the result with exit code, stdout and stderr."""
    runner = CliRunner()
    return lambda *words, **options: runner.invoke(app, [str(word) for word in words], **options)
