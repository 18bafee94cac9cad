"""Asking a model, fast: log-probabilities of continuations, and texts that it writes."""

from kecore.inference.generation import Generation, generate
from kecore.inference.routing import routing_change
from kecore.inference.scoring import ContinuationScore, score_continuations

__all__ = ["ContinuationScore", "Generation", "generate", "routing_change", "score_continuations"]
