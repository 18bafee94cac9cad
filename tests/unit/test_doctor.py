from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kecore import _version, doctor, models
from kecore.api import registry
from kecore.api.errors import KecoreError
from kecore.api.registry import MethodInfo, Registry
from kecore.cli import app
from kecore.ops import loader, measure


def test_report_is_true_and_plain_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KECORE_CACHE", str(tmp_path / "not" / "yet"))
    found = doctor.make_report()
    assert found.kecore == _version.__version__
    assert found.packages["torch"] == torch.__version__
    assert found.threads == torch.get_num_threads()
    assert found.instructions == torch.backends.cpu.get_cpu_capability()
    assert found.bfloat16_speed > 0
    assert bool(found.devices) == torch.cuda.is_available()
    assert {method.name for method in found.methods} >= {"rome", "memit"}
    assert found.cache.path == str(tmp_path / "not" / "yet")
    assert found.cache.writable
    assert found.cache.free > 0
    assert not (tmp_path / "not").exists(), "looking must not create the cache"
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["methods"][0]["name"] == found.methods[0].name
    assert plain["cache"]["free"] == found.cache.free


@pytest.mark.parametrize(("speed", "advised"), [(0.2, True), (4.0, False)])
def test_bfloat16_is_advised_against_where_it_is_slow(
    speed: float, advised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_bfloat16_speed", lambda: speed)
    text = " ".join(CliRunner().invoke(app, ["doctor"]).stdout.split())
    assert f"bfloat16 at {speed} times the speed of float32" in text
    assert ("leave precision=bfloat16 out" in text) == advised


def test_every_op_is_tested_numerically() -> None:
    found = doctor.make_report()
    assert {backend.op for backend in found.backends} >= {"second_moment_", "kv_solve"}
    assert all(0 < backend.relative_error < 1e-6 for backend in found.backends)
    assert not found.refused


def test_a_wrong_result_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("kv_solve on cuda", "jit", "why", 3e-2), ("second_moment_", "jit", "why", float("nan"))]
    monkeypatch.setattr(measure, "self_test", lambda: rows)
    found = doctor.make_report()
    assert found.backends[0] == doctor.Backend("kv_solve on cuda", "jit", "why", 3e-2)
    text = "\n".join(found.problems)
    assert "kv_solve on cuda of jit is off by 3.0e-02: set KECORE_NATIVE=off" in text
    assert "second_moment_ of jit is off by nan" in text


def test_what_is_forced_and_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_resolved", None)
    monkeypatch.setenv("KECORE_NATIVE", "aot")
    found = doctor.make_report()
    assert found.refused
    assert found.backends == ()
    assert any(problem.startswith("KECORE_NATIVE=aot, but there is no native library") for problem in found.problems)
    monkeypatch.setenv("KECORE_NATIVE", "fast")
    found = doctor.make_report()
    assert found.refused
    assert any("expected one of auto, aot, jit, require, off" in problem for problem in found.problems)


def test_each_problem_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> list[tuple[str, str, str, float]]:
        raise RuntimeError("ninja fell over")

    def describe(self: Registry) -> list[MethodInfo]:
        return [MethodInfo("bad", "broken", "1.0", "m:C", error="method 'bad' of broken cannot be imported")]

    (tmp_path / "file").touch()
    monkeypatch.setenv("KECORE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(measure, "self_test", broken)
    monkeypatch.setattr(models, "demo_file", lambda: None)
    monkeypatch.setattr(Registry, "describe", describe)
    found = doctor.make_report()
    assert found.demo is None
    assert not found.cache.writable
    text = "\n".join(found.problems)
    assert "method 'bad' of broken cannot be imported" in text
    assert "set KECORE_CACHE" in text
    assert models.DEMO_MISSING in text
    assert "ninja fell over" in text


def test_no_methods_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "default_registry", lambda: Registry([]))
    assert any("no editing methods" in problem for problem in doctor.make_report().problems)


@pytest.fixture
def kecore() -> Callable[..., Any]:
    runner = CliRunner()
    return lambda *words: runner.invoke(app, list(words))


def test_command_ends_with_an_error_where_a_forced_backend_is_missing(
    kecore: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_resolved", None)
    monkeypatch.setenv("KECORE_NATIVE", "aot")
    done = kecore("doctor", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["refused"] is True


def test_command_prints_backends_and_their_errors(kecore: Callable[..., Any]) -> None:
    done = kecore("doctor")
    assert done.exit_code == 0
    assert "kv_solve" in done.stdout
    assert "e-07" in done.stdout


def test_bench_measures_each_op_against_torch_and_peers(
    kecore: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = (measure.MomentCase(64, 100), measure.MomentCase(48, 40, torch.float32), measure.SolveCase(70, 5))
    monkeypatch.setattr(measure, "CASES", cases)
    found = json.loads(kecore("doctor", "--bench", "--json").stdout)
    assert [(r["d"], r["n"], r["dtype"]) for r in found["second_moment_"]] == [
        (64, 100, "bfloat16"),
        (48, 40, "float32"),
    ]
    (solve,) = found["kv_solve"]
    assert set(solve) == {"d", "n", "dtype", "native_s", "torch_s", "peers_s", "relative_error"}
    assert solve["relative_error"] < 1e-6
    assert min(solve["native_s"], solve["torch_s"], solve["peers_s"]) > 0
    assert "than peers" in kecore("doctor", "--bench").stdout


def test_a_wrong_competitor_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = measure.MomentCase(30, 20)
    monkeypatch.setattr(measure, "second_moment_", lambda moment, keys: moment)
    with pytest.raises(KecoreError, match="computed wrongly"):
        measure.measure_case(case)


@pytest.mark.parametrize("n", [1, 9])
def test_the_benchmarks_covariance_is_its_factors(n: int) -> None:
    """What competitors are given are one and the same problem."""
    case = measure.SolveCase(60, n)
    inverse = torch.linalg.inv(case.covariance)
    factor = case.factor.double()
    assert float((factor.t() @ factor - inverse).norm() / inverse.norm()) < 1e-6
    k = case.keys.double()
    wanted = torch.linalg.solve(case.d * case.covariance + k @ k.t(), k)
    assert float((case.exact - wanted).norm() / wanted.norm()) < 1e-10
