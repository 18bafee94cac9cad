"""Every registered method keeps what it declares."""

from __future__ import annotations

from kecore import registry
from kecore.testing import parametrize_with_checks
from kecore.testing.conformance import Case

METHODS = [registry.default().get(name) for name in registry.default().names()]


@parametrize_with_checks(METHODS)
def test_conformance(check: Case) -> None:
    check()
