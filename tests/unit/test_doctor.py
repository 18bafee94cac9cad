from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kecore import _version, doctor, models, ops, registry
from kecore.registry import MethodInfo, Registry


def test_report_is_true_and_plain_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KECORE_CACHE", str(tmp_path / "not" / "yet"))
    found = doctor.report()
    assert found.kecore == _version.__version__
    assert found.packages["torch"] == torch.__version__
    assert found.threads == torch.get_num_threads()
    assert bool(found.devices) == torch.cuda.is_available()
    assert {method.name for method in found.methods} >= {"rome", "memit"}
    assert found.cache.path == str(tmp_path / "not" / "yet")
    assert found.cache.writable
    assert found.cache.free > 0
    assert not (tmp_path / "not").exists(), "looking must not create the cache"
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["methods"][0]["name"] == found.methods[0].name
    assert plain["cache"]["free"] == found.cache.free


def test_backends_come_from_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("kv_solve", "torch", "no compiler was found")]
    monkeypatch.setattr(ops, "backend_report", lambda: rows, raising=False)
    assert doctor.report().backends == (doctor.Backend("kv_solve", "torch", "no compiler was found"),)


def test_each_problem_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> list[tuple[str, str, str]]:
        raise RuntimeError("ninja fell over")

    def describe(self: Registry) -> list[MethodInfo]:
        return [MethodInfo("bad", "broken", "1.0", "m:C", error="method 'bad' of broken cannot be imported")]

    (tmp_path / "file").touch()
    monkeypatch.setenv("KECORE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(ops, "backend_report", broken, raising=False)
    monkeypatch.setattr(models, "demo_file", lambda: None)
    monkeypatch.setattr(Registry, "describe", describe)
    found = doctor.report()
    assert found.demo is None
    assert not found.cache.writable
    text = "\n".join(found.problems)
    assert "method 'bad' of broken cannot be imported" in text
    assert "set KECORE_CACHE" in text
    assert models.DEMO_MISSING in text
    assert "ninja fell over" in text


def test_no_methods_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "default", lambda: Registry([]))
    assert any("no editing methods" in problem for problem in doctor.report().problems)
