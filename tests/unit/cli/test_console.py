"""What people and programs read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kecore.cli.console import (
    Screen,
    count_noun,
    format_bytes,
    format_score,
    format_seconds,
    make_table,
    replace_controls,
    to_plain_json,
)
from kecore.cli.loading import span


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "12 ms"), (1.234, "1.2 s"), (99.94, "99.9 s"), (100, "1 min 40 s"), (3700, "1 h 1 min")],
)
def test_seconds(value: float, text: str) -> None:
    assert format_seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "unknown"),
        (12, "12 bytes"),
        (2048, "2.0 KiB"),
        (3 << 20, "3.0 MiB"),
        (5 << 30, "5.00 GiB"),
        (9 << 40, "9216.00 GiB"),
    ],
)
def test_size(value: int | None, text: str) -> None:
    assert format_bytes(value) == text


def test_words() -> None:
    assert (count_noun(1, "fact"), count_noun(0, "fact"), format_score(None), format_score(0.5)) == (
        "1 fact",
        "0 facts",
        "-",
        "0.500",
    )
    assert [span(x) for x in ([3], [1, 2], [2, 1, 0], [0, 2, 4])] == ["3", "1, 2", "0 to 2", "0, 2, 4"]


def test_json_holds_what_json_can_hold() -> None:
    value = {"path": Path("a") / "b", 3: (1, 2), "bad": [float("nan"), float("inf"), 1.5], "none": None}
    assert to_plain_json(value) == {"path": str(Path("a") / "b"), "3": [1, 2], "bad": [None, None, 1.5], "none": None}


def test_a_model_cannot_command_the_terminal() -> None:
    assert replace_controls("a\x1b[2Jb\x07\nc\u4eac") == "a\ufffd[2Jb\ufffd\nc\u4eac"


def test_json_is_all_of_stdout_and_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(as_json=True)
    screen.show(make_table("a", rows=[("[bold]not markup",)]))
    with screen.stage("load", "loading [x]"):
        screen.progress("inner", 1, 2)
    screen.warn("careful")
    screen.finish({"n": 1})
    screen.finish({"n": 2})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"n": 1}
    assert err.splitlines()[1:] == ["warning: careful"]
    assert err.startswith("done loading [x] ")
    assert set(screen.stages) == {"load"}
    assert screen.warnings == ["careful"]


def test_people_get_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.show(make_table("a", rows=[("[bold]not markup",)], title="Title"))
    screen.finish({"n": 1})
    out, err = capsys.readouterr()
    assert "Title" in out
    assert "[bold]not markup" in out
    assert "{" not in out
    assert err == ""


def test_stage_times_add_up_and_survive_a_failure() -> None:
    screen = Screen(as_json=True)
    with pytest.raises(ValueError, match="x"), screen.stage("a", "a"):
        raise ValueError("x")
    first = screen.stages["a"]
    with screen.stage("a", "a"):
        pass
    assert screen.stages["a"] > first
