"""The page on metrics: its code runs, and its families and keys are those that are installed."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from hand_scores import probe

from kecore.evaluate.metrics import GROUP, STANDARD, family
from kecore_analysis.tasks import TASKS


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs" / "metrics.md").read_text(encoding="utf-8")


def test_families_and_keys_are_those_installed(page: str) -> None:
    table = page.partition("## Families")[2].partition("## Definitions")[0]
    rows = re.findall(r"^\| `([\w-]+)` \| (.*?) \|", table, re.MULTILINE)
    assert [name for name, _ in rows[: len(STANDARD)]] == list(STANDARD)
    assert {name for name, _ in rows} == {
        point.name for point in entry_points(group=GROUP) if point.dist and point.dist.name == "kecore"
    }
    for name, keys in rows:
        written = set(re.findall(r"`(\w+)`", keys)) - {"score"}
        assert written == {metric.key for metric in family(name)}, name


def test_every_task_is_named(page: str) -> None:
    assert all(f"`{name}`" in page for name in TASKS)


def test_the_example_metric(page: str) -> None:
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "SURPRISE" in block)
    found: dict[str, Any] = {}
    exec(code, found)  # noqa: S102
    assert found["SURPRISE"].value(probe("edit", answers=()), found["Protocol"]()) is None


@pytest.mark.real_model
def test_the_example_of_side_effects(
    page: str, smollm2: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kecore import Editor

    editor = Editor(*smollm2)
    monkeypatch.setattr(Editor, "from_pretrained", lambda ref: editor)
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "checkup(" in block)
    try:
        exec(code.replace("[:20]", "[:3]"), {})  # noqa: S102
    finally:
        editor.revert(len(editor.history)) if editor.history else None
    shown = capsys.readouterr().out
    assert re.search(r"^perplexity: \d+\.\d+ -> \d+\.\d+, [+-]\d+\.\d+ ± \d", shown, re.MULTILINE)
    assert re.search(r"^drift: 0\.000 -> \d", shown, re.MULTILINE)
    assert re.search(r"condition \d+ -> \d+", shown)
