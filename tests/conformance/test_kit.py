"""The kit itself: a method without a fault passes, and every check catches the faults that it is there for."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import planted
import pytest

from kecore.api.types import Capabilities
from kecore.testing import NonConformance, Trial, check_method, parametrize_with_checks
from kecore.testing.bench import Bench
from kecore.testing.checks import CHECKS
from kecore.testing.conformance import Case, cases
from kecore.testing.watch import watch_side_effects

ONE = ("llama",)
BY_NAME = {check.name: check for check in CHECKS}

# A package whose fault shows when it is imported, or in a second model.
PACKAGES = {
    "import_is_quiet": """
import sys
from planted import Good
sys.stderr.write("thank you for choosing talker")
class Method(Good):
    pass
""",
    "two_models_do_not_mix": """
from planted import Good
CACHE = {}
class Method(Good):
    def solve(self, site, keys, residuals):
        size = CACHE.setdefault("size", float(residuals.norm()))
        return super().solve(site, keys, residuals * size / residuals.norm())
""",
}


@parametrize_with_checks([planted.Good, Trial(planted.RefusesASecond, models=ONE)])
def test_a_method_without_a_fault_passes(check: Case) -> None:
    check()


@pytest.mark.parametrize(
    ("check", "method", "error"), planted.FAULTS, ids=[f"{cls.__name__}-{check}" for check, cls, _ in planted.FAULTS]
)
def test_a_fault_is_caught(
    check: str, method: type[planted.Good], error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert BY_NAME[check].applies(method.capabilities)
    with pytest.raises(error) as caught:
        BY_NAME[check].run(Bench(Trial(method), "llama"))
    assert caught.type is error


@pytest.mark.parametrize("check", PACKAGES)
def test_a_fault_of_a_package_is_caught(check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"faulty_{check}"
    (tmp_path / f"{name}.py").write_text(PACKAGES[check])
    monkeypatch.syspath_prepend(tmp_path)
    method = importlib.import_module(name).Method
    loaded = sys.modules[name]
    with pytest.raises(NonConformance):
        BY_NAME[check].run(Bench(Trial(method), "llama"))
    assert sys.modules.pop(name) is loaded


def test_every_check_catches_some_fault() -> None:
    caught = {check for check, _, _ in planted.FAULTS} | set(PACKAGES)
    assert {check.name for check in CHECKS} - caught == {"works_on_cuda"}
    assert all(check.promise for check in CHECKS)


def test_checks_follow_from_capabilities() -> None:
    def chosen(**flags: Any) -> set[str]:
        class Method(planted.Good):
            capabilities = Capabilities("weights", **flags)

        return {case.check.name for case in cases(Trial(Method, models=ONE))}

    every = chosen()
    assert chosen(batch=True) - every == {"every_request_of_a_batch_counts", "order_of_a_batch_does_not_matter"}
    assert every - chosen(batch=True) == {"several_requests_are_refused"}
    assert chosen(sequential=True) - every == {"second_edit_keeps_the_first", "several_requests_are_written_or_refused"}
    assert every - chosen(sequential=True) == {"several_requests_are_refused"}
    assert "several_requests_are_written_or_refused" not in chosen(sequential=True, batch=True)
    assert every - chosen(reversible=False) == {"reverting_is_exact"}
    assert chosen(needs_examples=True) - every == {"what_is_missing_is_asked_for"}


def test_declared_failures_are_strict() -> None:
    trial = Trial(planted.HardlyWrites, models=ONE, expected_failures={"targets_become_likelier": "it is shy"})
    (mark,) = parametrize_with_checks([trial]).args[1:]  # type: ignore[attr-defined]
    marks = {parameter.id: [(m.name, dict(m.kwargs)) for m in parameter.marks] for parameter in mark}
    expected = ("xfail", {"reason": "it is shy", "strict": True})
    assert marks.pop("good-llama-targets_become_likelier") == [expected]
    assert marks
    assert not any(marks.values())


def test_a_declared_failure_that_is_none_is_reported() -> None:
    config = {"steps": 15}
    trial = Trial(planted.Good, config, ONE, expected_failures={"plan_is_quiet": "it talks"})
    with pytest.raises(NonConformance, match=r"^1 checks failed:\ngood-llama-plan_is_quiet: passes.*it talks\)$"):
        check_method(trial)


def test_a_declared_failure_must_name_a_check() -> None:
    with pytest.raises(ValueError, match=r"plan_is_quit; known: .*plan_is_quiet"):
        check_method(Trial(planted.Good, expected_failures={"plan_is_quit": "a slip"}))


def test_without_pytest_all_failures_are_listed_at_once() -> None:
    trial = Trial(planted.Prints, models=ONE, expected_failures={})
    with pytest.raises(NonConformance, match="good-llama-plan_is_quiet: NonConformance: the plan wrote 'planning"):
        check_method(trial)


def test_the_kit_is_imported_without_pytest() -> None:
    code = "import sys, kecore.testing; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pytest_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)
    with pytest.raises(ImportError, match="pip install pytest"):
        parametrize_with_checks([planted.Good])


def test_watching_ends_with_the_block(tmp_path: Path) -> None:
    with watch_side_effects() as notes:
        (tmp_path / "in.txt").write_text("")
        (tmp_path / "in.txt").read_text()
    (tmp_path / "out.txt").write_text("")
    assert notes == [f"opened {tmp_path / 'in.txt'} for writing"]


def test_caches_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KECORE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    with watch_side_effects() as notes:
        (tmp_path / "cache" / "kept").write_text("")
    assert notes == []
