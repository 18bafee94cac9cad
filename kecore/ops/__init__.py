"""The two computations that kecore's speed rests on, with documented shapes and error bounds."""

from kecore.ops import schema
from kecore.ops.api import Solution, Solutions, kv_solve, kv_solve_batch, second_moment_

__all__ = ["OPS", "Solution", "Solutions", "kv_solve", "kv_solve_batch", "second_moment_"]

OPS = schema.OPS
"""Names in ``torch.ops.kecore``."""
