"""Asking a model, fast: log-probabilities of continuations, and texts that it writes."""

from kecore.inference.generation import Generation, generate
from kecore.inference.scoring import ContinuationScore, score_continuations

__all__ = ["ContinuationScore", "Generation", "generate", "score_continuations"]
