"""docs/write-a-stage.md shows the files of plugins/kecore-hello, and what they do is what the page says."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kecore.engine import ClosedForm, Evenly, Keys, ValueSettings
from kecore.engine.closed_form import unsolved
from kecore.model import SiteId

HELLO = Path("plugins", "kecore-hello")


@pytest.fixture
def text(root: Path) -> str:
    return (root / "docs" / "write-a-stage.md").read_text(encoding="utf-8")


@pytest.fixture
def stage(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stage's class, from the folder as it stands."""
    monkeypatch.syspath_prepend(str(root / HELLO))
    from kecore_hello_stage import HelloStage

    yield HelloStage
    for name in ("kecore_hello_stage", "kecore_hello_spread"):
        sys.modules.pop(name, None)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def test_blocks_are_the_files(root: Path, text: str) -> None:
    *spread, stage = blocks(text, "python")
    assert lines("\n".join(spread)) == lines((root / HELLO / "kecore_hello_spread.py").read_text(encoding="utf-8"))
    assert lines(stage) == lines((root / HELLO / "kecore_hello_stage.py").read_text(encoding="utf-8"))
    (entries,) = blocks(text, "toml")
    assert entries in (root / HELLO / "pyproject.toml").read_text(encoding="utf-8")


def test_the_table_names_the_steps_of_a_form(text: str) -> None:
    named = re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)
    assert set(named) == {"values", "coupling", "target", "spread", "solve", "post", "grouping", "bare", "gain"}
    assert set(named) <= set(ClosedForm.__dataclass_fields__)


def test_the_stage_puts_its_spread_into_a_form(stage: Any) -> None:
    form = ClosedForm(layers=(0, 1, 2), contexts=0, context_tokens=0, values=ValueSettings(), solve=unsolved)
    staged = stage().apply(form, stage.Settings(power=3))
    assert replace(staged, spread=form.spread) == form
    keys, missing = Keys(torch.zeros(1, 2), torch.ones(1, 1).to_sparse()), torch.ones(1, 4)
    shares = [float(staged.spread.share(SiteId(0), keys, missing, remaining).mean()) for remaining in (3, 2, 1)]
    assert shares == pytest.approx([1 / 27, 1 / 8, 1.0])
    even = stage().apply(form, stage.Settings(power=1)).spread.share(SiteId(0), keys, missing, 3)
    torch.testing.assert_close(even, Evenly().share(SiteId(0), keys, missing, 3))
