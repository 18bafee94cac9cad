"""Tells how long stages will take on this machine, from what they compute and a pace that is measured in a moment.

A stage's :class:`~kecore.memory.Need` counts its passes, tokens and operations. The pace is that of two of the model's
own layers on a few tokens: once on a single short row, which mostly reads weights, and once on a longer one, which
mostly computes. What a stage takes is the sum of both; loops that end early, as those of values do, end before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kecore.memory import Need, Work, vocabulary_size
from kecore.model import ModelView, Output
from kecore.text import Rows

__all__ = ["Pace", "forecast_seconds", "measure_pace"]

_SHORT, _LONG = 8, 128  # tokens of the two rows
_LAYERS = 2
_REPEATS = 2  # of which the quickest counts: the first one also makes buffers


@dataclass(frozen=True, slots=True)
class Pace:
    """How quick one layer of a model is on this machine.

    Args:
        per_pass: seconds of a pass, however few its tokens are.
        per_token: seconds of each of its tokens.
        per_operation: seconds of one multiplication and addition among many.
        unembedding: multiplications and additions of the logits of one position.
    """

    per_pass: float
    per_token: float
    per_operation: float
    unembedding: int

    def seconds(self, work: Work) -> float:
        """Return how long a stage takes that computes so much."""
        through_layers = work.layers * (work.passes * self.per_pass + work.tokens * self.per_token)
        return through_layers + self.per_operation * (work.operations + work.logits * self.unembedding)


@torch.no_grad()
def measure_pace(view: ModelView) -> Pace:
    """Run the lowest layers of a model on a few tokens, and return their pace.

    Raises:
        UnsupportedModelError: the model's layers cannot be read.
    """
    view.layer(0)
    layers = min(_LAYERS, len(view.layers))
    longest = _LONG if view.max_length is None else min(_LONG, view.max_length)
    shortest = min(_SHORT, longest // 2)
    short = _fastest(view, shortest, layers) / layers
    long = _fastest(view, longest, layers) / layers
    # Noise of a busy machine must not make a token cost less than nothing, nor a pass.
    per_token = max(long - short, long / 4) / (longest - shortest)
    per_pass = max(0.0, short - shortest * per_token)
    weights = sum(parameter.numel() for parameter in view.layers[0].module.parameters())
    return Pace(per_pass, per_token, per_token / max(1, weights), vocabulary_size(view) * view.width)


def forecast_seconds(pace: Pace, needs: Sequence[Need]) -> float | None:
    """Return how long stages take together at the most; None where one does not say what it computes."""
    total = 0.0
    for need in needs:
        if need.work is None:
            return None
        total += pace.seconds(need.work)
    return total


def _fastest(view: ModelView, tokens: int, layers: int) -> float:
    """Return the seconds of the quickest of some passes of one row."""
    ids = torch.arange(tokens).remainder(vocabulary_size(view)).unsqueeze(0)  # [1, tokens]
    rows = Rows(ids, torch.ones_like(ids), torch.zeros(1, dtype=torch.long))
    last = Output(layers - 1)
    quickest = float("inf")
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        hidden = view.run(rows, taps=[last], last=last.layer)[last]  # [1, tokens, d_model]
        hidden.sum().item()  # waits for the device
        quickest = min(quickest, time.perf_counter() - begin)
    return quickest
