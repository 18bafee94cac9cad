"""The phases of benchmarks/gpu_check.py run on a CPU with tiny sizes: no slip of the pen is left for a GPU to find."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def gpu_check(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module("gpu_check")


def test_every_phase_runs_and_is_kept(gpu_check: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    for phase in gpu_check.PHASES:
        assert gpu_check.main([phase, "--device", "cpu", "--small", "--out", str(out)]) == 0, capsys.readouterr().out
    results = json.loads(out.read_text())
    assert list(results) == list(gpu_check.PHASES)
    assert all(results.values())
    assert not [row for row in results["editing"] if "failed" in row or "skipped" in row]
    assert {row["op"] for row in results["check"]} >= {"second_moment_ bfloat16", "kv_solve", "opcheck gram_solve"}


def test_the_table_shows_every_phase(gpu_check: Any) -> None:
    shown = gpu_check.table({"solve": [{"d": 8, "of_peers": 31.25}], "check": [{"op": "x", "ok": True}, {"why": "y"}]})
    solve, check = (
        ["", "== solve", "d  of_peers", "8      31.2"],
        ["", "== check", "op    ok", " x  True", "why", "  y"],
    )
    assert shown.splitlines() == solve + check


def test_a_wrong_sum_is_found(gpu_check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    correct = importlib.import_module("gpu_correct")

    def doubled(moments: Any, keys: Any, **choice: Any) -> None:
        correct_sum(moments, keys, **choice)
        correct_sum(moments, keys, **choice)

    correct_sum = correct.second_moment_
    monkeypatch.setattr(correct, "second_moment_", doubled)
    arguments = ["check", "--device", "cpu", "--small", "--out", str(tmp_path / "results.json")]
    assert gpu_check.main(arguments) == 1


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_the_shell_script_parses(root: Path) -> None:
    script = root / "benchmarks" / "gpu_check.sh"
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, check=False).returncode == 0
