"""Which facts hold after an edit, and what an edit is required to reach."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hand_scores import probe, score
from rich.console import Console

from kecore.api.errors import ConfigError
from kecore.cli.verdicts import failures_table, read_requirements, unmet, write_verdicts
from kecore.evaluate import AnsweredProbe, Evaluation, Protocol, RecordResult
from kecore.evaluate.verdicts import verdicts_of


def answered(prompt: str, target: str, *, wrong: tuple[int, ...] = (), text: str = "") -> AnsweredProbe:
    made = probe("edit", score(0.5, 0.5, wrong=wrong), text=text)
    return replace(made, probe=replace(made.probe, prompt=prompt, answers=(target,)))


@pytest.fixture
def after() -> Evaluation:
    rows = (
        RecordResult("a", "", (answered("A is", "x y"),)),
        RecordResult("b", "", (answered("B is", "z w", wrong=(1,), text="z q"), answered("B has", "u v"))),
    )
    return Evaluation(Protocol(), rows)


def test_each_edited_prompt_has_a_verdict(after: Evaluation, tmp_path: Path) -> None:
    verdicts = verdicts_of(after)
    assert [(v.id, v.prompt, v.holds, v.right_tokens, v.tokens) for v in verdicts] == [
        ("a", "A is", True, 2, 2), ("b", "B is", False, 1, 2), ("b", "B has", True, 2, 2)
    ]  # fmt: skip
    console = Console(width=100, record=True)
    console.print(failures_table(verdicts))
    text = " ".join(console.export_text().split())
    assert "1 of 3 facts failed" in text
    assert "b B is z w z q 1 of 2" in text
    assert failures_table([verdict for verdict in verdicts if verdict.holds]) is None
    path = write_verdicts(tmp_path / "verdicts.csv", verdicts)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["holds"] for row in rows] == ["True", "False", "True"]
    assert rows[1]["written"] == "z q"


def test_what_is_required(after: Evaluation) -> None:
    required = read_requirements(["strict=0.95", "PS=0.5", "token_accuracy=0.2"])
    assert required == {"strict_accuracy": 0.95, "paraphrase_success": 0.5, "token_accuracy": 0.2}
    assert unmet(required, after) == [
        "strict_accuracy is 0.750, 0.95 is required",
        "paraphrase_success is -, 0.5 is required",
    ]
    assert unmet(read_requirements(["strict=0.75"]), after) == []
    assert read_requirements(None) == {}


@pytest.mark.parametrize(
    ("pair", "message"),
    [("strict", "takes SCORE=VALUE"), ("strickt=1", "got 'strickt=1'; scores: strict, es"), ("strict=x", "got 'x'")],
)
def test_requirements_that_are_none(pair: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_requirements([pair])


def test_long_lists_are_cut() -> None:
    failed = SimpleNamespace(holds=False, id="a", prompt="p", target="t", written="", right_tokens=0, tokens=1)
    many = [cast(Any, failed)] * 30
    table = failures_table(many)
    assert table is not None
    assert table.title == "30 of 30 facts failed; the first 20 (all in verdicts.csv)"
    assert table.row_count == 20
