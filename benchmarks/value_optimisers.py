"""Ways to optimise MEMIT's values: what each writes, and how many evaluations of the loss it takes.

    python benchmarks/value_optimisers.py --facts FILE --text FILE [--first 2400] [--limit 80] [--precision bfloat16]

All facts are edited at once with the defaults but for the optimiser, on records that no figure of the documentation is
about. L-BFGS lives here alone: the table in docs/design/0001-values-and-keys.md says why the package has none.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from bench_common import scores, statistics_of
from torch import Tensor

import kecore
from kecore import Editor, load_records
from kecore.engine import values
from kecore.engine.value_steps import ValueBatch

PAIRS = 8  # of positions and gradients that L-BFGS remembers
LONGEST = 0.3  # of its steps, relative to the hidden state


class LBFGS(ValueBatch):
    """Two-loop recursion for each group by itself, with a longest step in the place of a line search."""

    pairs: list[tuple[Tensor, Tensor, Tensor]] | None = None
    before: tuple[Tensor, Tensor] | None = None

    def _descent(self, gradient: Tensor, t: int) -> Tensor:
        pairs = self.pairs or []
        if self.before is not None:
            s, y = self.delta - self.before[0], gradient - self.before[1]
            curvature = (s * y).sum(1, keepdim=True)
            # A pair without positive curvature is left out: its factor is zero.
            rho = torch.where(curvature > 1e-8 * y.norm(dim=1, keepdim=True) ** 2, 1 / curvature, 0.0)
            pairs = [*pairs, (s, y, rho)][-PAIRS:]
        self.pairs, self.before = pairs, (self.delta.clone(), gradient.clone())
        direction, factors = gradient, list[Tensor]()
        for s, y, rho in reversed(pairs):
            factors.append(rho * (s * direction).sum(1, keepdim=True))
            direction = direction - factors[-1] * y
        first = self.settings.learning_rate * self.reference / gradient.norm(dim=1, keepdim=True)
        scale = first
        for s, y, rho in pairs:
            scale = torch.where(rho > 0, (s * y).sum(1, keepdim=True) / (y * y).sum(1, keepdim=True), scale)
        direction = scale * direction
        for (s, y, rho), factor in zip(pairs, reversed(factors), strict=True):
            direction = direction + s * (factor - rho * (y * direction).sum(1, keepdim=True))
        length = direction.norm(dim=1, keepdim=True)
        return direction * (LONGEST * self.reference / length.clamp(min=1e-12)).clamp(max=1.0)


class OneNoise(LBFGS):
    """The same with the noise of the first step in all of them, so that it has one function to find the minimum of."""

    def _noise(self) -> Tensor | None:
        steps, self.steps = self.steps, torch.zeros_like(self.steps)
        try:
            return super()._noise()
        finally:
            self.steps = steps


TRIALS: dict[str, tuple[type[Any] | None, dict[str, Any]]] = {
    "gradient, 20 steps (default)": (None, {}),
    "gradient, 16 steps": (None, {"steps": 16, "learning_rate": 0.12}),
    "gradient, 12 steps": (None, {"steps": 12, "learning_rate": 0.16}),
    "gradient, until most probable": (None, {"stop_most_probable": True}),
    "Adam, 20 steps, rate 0.5": (None, {"optimizer": "adam", "learning_rate": 0.5}),
    "L-BFGS, 20 steps": (LBFGS, {}),
    "L-BFGS, 20 steps, one noise": (OneNoise, {}),
    "L-BFGS, 12 steps, one noise": (OneNoise, {"steps": 12}),
    "L-BFGS, 20 steps, no noise": (LBFGS, {"noise": 0.0}),
}


def main() -> None:
    """Parse the command line, run the trials, print a row each."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="demo")
    made.add_argument("--facts", required=True, type=Path)
    made.add_argument("--text", required=True, type=Path)
    made.add_argument("--first", type=int, default=2400)
    made.add_argument("--limit", type=int, default=80)
    made.add_argument("--precision", default="bfloat16")
    made.add_argument("--trials", help="parts of the names of trials, separated by |; all by default")
    made.add_argument("--tokens", type=int, default=None, help="of the statistics")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--cache", type=Path, default=Path("out/statistics"))
    made.add_argument("--json", action="store_true", help="what it prints anyway: an object a line")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", kecore.KecoreWarning)
    records = list(islice(load_records(options.facts, limit=options.first + options.limit), options.first, None))
    editor = Editor.from_pretrained(options.model, dtype="float32")
    layers = range(len(editor.view.layers) // 2)
    editor.statistics = statistics_of(editor, options.text, layers, options.tokens, options.cache)
    sys.stdout.write(json.dumps({"trial": "unedited", **scores(editor.evaluate(records))}) + "\n")
    for name, (batch, config) in TRIALS.items():
        if options.trials and not any(part in name for part in options.trials.split("|")):
            continue
        with patched(batch):
            begin = time.process_time()
            edit = editor.edit(records, "memit", precision=options.precision, **config)
            spent = time.process_time() - begin
        notes: dict[str, Any] = dict(edit.notes)
        evaluations = sum(notes["value_steps"]) / len(notes["value_steps"])
        row: dict[str, Any] = {"trial": name, **scores(editor.evaluate(records)), "evaluations": round(evaluations, 1)}
        loss = sum(notes["value_loss"]) / len(notes["value_loss"])
        row |= {"loss": round(loss, 4), "processor_s": round(spent, 1)}
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
        editor.revert()


def patched(batch: type[Any] | None) -> AbstractContextManager[Any]:
    """Values by this class."""
    return nullcontext() if batch is None else patch.object(values, "ValueBatch", batch)


if __name__ == "__main__":
    main()
