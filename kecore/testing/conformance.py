"""The conformance kit: does a method keep what its class declares and what kecore asks of every method?

In a test file, with pytest::

    from kecore.testing import parametrize_with_checks

    @parametrize_with_checks([MyMethod])
    def test_conformance(check):
        check()

Elsewhere, :func:`check_method` runs everything and raises once. kecore's own methods pass the same kit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kecore.api.errors import MissingDependencyError
from kecore.testing.bench import Bench, NonConformance, Trial
from kecore.testing.checks import CHECKS, Check

__all__ = ["Case", "cases", "check_method", "parametrize_with_checks"]

F = TypeVar("F", bound=Callable[..., object])


@dataclass(frozen=True, slots=True)
class Case:
    """One check of one method on one tiny model; call it to run it.

    Args:
        check: the promise.
        bench: method and model.
    """

    check: Check
    bench: Bench

    @property
    def id(self) -> str:
        """``method-model-check``, with the trial's label behind the method where it has one."""
        trial = self.bench.trial
        name = f"{trial.method.name}-{trial.label}" if trial.label else trial.method.name
        return f"{name}-{self.bench.architecture}-{self.check.name}"

    @property
    def reason(self) -> str:
        """Return why the method is declared not to pass; empty where it is to pass."""
        return self.bench.trial.expected_failures.get(self.check.name, "")

    def __call__(self) -> None:
        """Run the check.

        Raises:
            NonConformance: the promise is not kept.
        """
        self.check.run(self.bench)


def cases(trial: Trial | type[Any]) -> Iterator[Case]:
    """Yield every check that a method has to pass, by its capabilities.

    Raises:
        ValueError: an expected failure names no check that applies.
    """
    trial = trial if isinstance(trial, Trial) else Trial(trial)
    chosen = [check for check in CHECKS if check.applies(trial.method.capabilities)]
    unknown = set(trial.expected_failures) - {check.name for check in chosen}
    if unknown:
        raise ValueError(
            f"expected failures of {trial.method.name} name no check of it: {', '.join(sorted(unknown))}; "
            f"known: {', '.join(check.name for check in chosen)}"
        )
    for index, architecture in enumerate(trial.models):
        bench = Bench(trial, architecture)
        for check in chosen:
            if check.every_model or index == 0:
                yield Case(check, bench)


def parametrize_with_checks(methods: Sequence[Trial | type[Any]]) -> Callable[[F], F]:
    """Return a pytest decorator: the test function's argument ``check`` is each check of each method, to be called.

    Ids read ``method-model-check``, so ``pytest -k saved_edit`` works. An expected failure becomes a strict
    ``xfail`` with its reason.

    Raises:
        MissingDependencyError: pytest is not installed.
    """
    try:
        import pytest
    except ImportError as error:
        raise MissingDependencyError(
            "parametrize_with_checks needs pytest: pip install pytest, or use check_method"
        ) from error
    parameters: list[Any] = []
    for method in methods:
        for case in cases(method):
            marks = [pytest.mark.xfail(reason=case.reason, strict=True)] if case.reason else []
            parameters.append(pytest.param(case, id=case.id, marks=marks))
    return pytest.mark.parametrize("check", parameters)


def check_method(method: Trial | type[Any]) -> None:
    """Run every check of one method, without pytest.

    Raises:
        NonConformance: lists every check that fails, and every expected failure that does not.
    """
    failures: list[str] = []
    for case in cases(method):
        try:
            case()
        except Exception as error:  # noqa: BLE001 - whatever a method raises where it should work is a failed check
            if not case.reason:
                failures.append(f"{case.id}: {type(error).__name__}: {error}")
        else:
            if case.reason:
                failures.append(f"{case.id}: passes, and was expected to fail ({case.reason})")
    if failures:
        raise NonConformance(f"{len(failures)} checks failed:\n" + "\n".join(failures))
