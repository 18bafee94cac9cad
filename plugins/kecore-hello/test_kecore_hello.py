"""What kecore asks of every method, asked of this one."""

from collections.abc import Callable

from kecore.testing import parametrize_with_checks
from kecore_hello import Hello


@parametrize_with_checks([Hello])
def test_conformance(check: Callable[[], None]) -> None:
    """Run one check."""
    check()
