"""The two computations that kecore's speed rests on, with documented shapes and error bounds."""

from kecore.ops.reference import Solution, kv_solve, second_moment_

__all__ = ["Solution", "backend_report", "kv_solve", "second_moment_"]


def backend_report() -> list[tuple[str, str, str]]:
    """Which implementation each op uses: ``(op, backend, reason)``."""
    reason = "this version of kecore has no native kernels"
    return [(op.__name__, "torch", reason) for op in (second_moment_, kv_solve)]
