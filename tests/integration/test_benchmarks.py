"""The benchmark scripts run, verify what they time, and print what they promise; their figures are not looked at."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from kecore import data, models
from kecore.models import DEMO_MISSING, demo_file
from kecore.testing import tiny_model, tiny_tokenizer

FACTS, TEXT = data.path("counterfact_sample.jsonl"), data.path("wikipedia_sample.jsonl.gz")
Script = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with layers enough for the published settings."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return models.save_model(tiny_model("llama", layers=10), tiny_tokenizer(), folder)


@pytest.fixture
def script(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """``script("scale", "--keys", 60)`` to the JSON objects that it prints; it runs in this process."""
    folder = root / "benchmarks"
    monkeypatch.syspath_prepend(folder)  # what scripts share stands beside them
    monkeypatch.chdir(tmp_path)

    def run(name: str, *words: object) -> list[dict[str, Any]]:
        path = folder / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, words), "--threads", "1", "--json"])
        with redirect_stdout(StringIO()) as printed:
            runpy.run_path(str(path), run_name="__main__")
        return [json.loads(line) for line in printed.getvalue().splitlines()]

    return run


@pytest.fixture
def fresh_script(root: Path, tmp_path: Path) -> Script:
    """The same in a process of its own, whose peak of memory is its own as well."""

    def run(name: str, *words: object) -> list[dict[str, Any]]:
        path = root / "benchmarks" / f"{name}.py"
        command = [sys.executable, str(path), *map(str, words), "--threads", "1", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def files(*more: object) -> tuple[object, ...]:
    return ("--facts", FACTS, "--text", TEXT, *more)


def test_vs_serial(script: Script, tiny: Path, tmp_path: Path) -> None:
    rows = script(
        "vs_serial", *files("--model", tiny, "--limit", 3, "--serial-limit", 2, "--serial-contexts", 1, "--steps", 2),
        "--methods", "memit,rome,alphaedit", "--tokens", 2000, "--cache", tmp_path / "statistics",
    )  # fmt: skip
    assert [(row["method"], row["n"], row["serial_n"]) for row in rows] == [
        ("memit", 3, 2), ("rome", 3, 2), ("alphaedit", 3, 2)
    ]  # fmt: skip
    for row in rows:
        assert row["ratio"] == pytest.approx(row["serial_s_per_fact"] / row["kecore_s_per_fact"], rel=0.05)
        assert {"ES", "PS", "NS", "strict"} <= row["kecore_scores"].keys() == row["serial_scores"].keys()
        assert row["conditions"]["threads"] == 1
        assert row["conditions"]["hardware"]["processor"]


def test_bench_evaluate(script: Script, tiny: Path) -> None:
    (found,) = script("bench_evaluate", "--facts", FACTS, "--model", tiny, "--records", 4, "--serial", 2)
    assert (found["records"], found["serial_records"]) == (4, 2)
    assert 0 <= found["largest_difference"] < 1e-4
    assert found["ratio_wall"] > 0
    assert {"edit_success", "perplexity", "free_generation", "score"} <= found["scores"].keys()


def test_bench_openings(script: Script, tiny: Path) -> None:
    (found,) = script("bench_openings", "--facts", FACTS, "--model", tiny, "--edits", 2, "--records", 1)
    (row,) = found["rows"]
    assert (found["edits"], row["method"], row["records"]) == (2, "ice", 1)
    assert 0 <= row["largest_difference"] < 1e-4
    assert row["ratio_cpu"] > 0
    assert {"ES", "PS", "NS", "strict"} <= row["scores"].keys()


def test_bench_edit(script: Script, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (found,) = script(
        "bench_edit", *files("--model", tiny, "--counts", "1,2", "--steps", 2, "--tokens", 2000, "--stat-tokens", 3000),
        "--cache", tmp_path / "statistics", "--out", tmp_path / "out",
    )  # fmt: skip
    rows = found["edits"]
    assert [(row["method"], row["n"]) for row in rows] == [
        (method, n) for method in ("rome", "memit", "alphaedit", "ft-m") for n in (1, 2)
    ]
    for row in rows:
        assert row["facts_per_second"] == pytest.approx(row["n"] / row["seconds"], rel=0.02)
        assert sum(row["stages"].values()) <= row["seconds"] + 0.01
    assert found["statistics"]["relative_difference"] < 1e-3
    assert found["statistics"]["tokens"] == 3000
    names = {"bench_edit.json", "facts_per_second.png", "stages.png"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    assert all(file.stat().st_size > 1000 for file in (tmp_path / "out").iterdir())


def test_value_optimisers(script: Script, tiny: Path, tmp_path: Path) -> None:
    unedited, *rows = script(
        "value_optimisers", *files("--model", tiny, "--first", 1, "--limit", 2, "--tokens", 2000),
        "--precision", "float32", "--trials", "12 steps|most probable", "--cache", tmp_path / "statistics",
    )  # fmt: skip
    assert unedited["trial"] == "unedited"
    assert [row["trial"].split(",")[0] for row in rows] == ["gradient", "gradient", "L-BFGS"]
    assert all(0 < row["evaluations"] <= 20 and {"ES", "PS", "NS"} <= row.keys() for row in rows)
    assert rows[-1]["loss"] != rows[0]["loss"]


@pytest.mark.parametrize("more", [(), ("--accumulate",)])
def test_scale(script: Script, more: tuple[str, ...]) -> None:
    narrow, wide = script("scale", "--widths", "32,64", "--d-out", 16, "--keys", 100, "--batches", 5, *more)
    assert (narrow["d"], wide["d"]) == (32, 64)
    assert wide["one_batch"]["relative_error"] < 1e-3
    assert wide["batches"]["all_edits_bytes"] == 4 * 100 * (16 + 64) + (4 * 100 * 64 if more else 0)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory cannot be reset here")
@pytest.mark.skipif(demo_file() is None, reason=DEMO_MISSING)
def test_memory_estimates_hold_on_a_real_model(fresh_script: Script) -> None:
    """Within a factor of three, from above where a micro-batch could hold more than there is to score."""
    rows = fresh_script(
        "memory", *files("--limit", 4, "--steps", 2, "--tokens", 4096, "--methods", "memit", "--budgets", "2GiB")
    )
    assert [row["stage"] for row in rows] == ["statistics", "score", "memit"]
    assert all(row["factor"] > 1 / 1.5 and (row["factor"] < 3 or row["stage"] == "score") for row in rows), rows
    assert all(row["within_budget"] for row in rows), rows
