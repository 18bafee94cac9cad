"""The two computations that kecore's speed rests on, with documented shapes and error bounds."""

from kecore.ops.reference import Solution, kv_solve, second_moment_

__all__ = ["Solution", "kv_solve", "second_moment_"]
