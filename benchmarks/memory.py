"""The estimates of kecore.memory against what is measured, stage by stage, on a real model.

    python benchmarks/memory.py --facts FILE --text FILE [--limit 20] [--budgets auto,1200MiB] [--json]

Measured is the peak of the process (VmHWM, reset before each stage) over what it held before; the estimate is what the
preflight says the stage adds. Under a budget the peak of the whole process must stay below it.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_common import peak, reset_peak

import kecore
from kecore import Corpus, Editor, load_records
from kecore.cli.options import byte_count
from kecore.inference.scoring import BATCH_TOKENS
from kecore.memory import Need, resident_bytes, scoring_need
from kecore.statistics import collect_statistics, collection_need, token_budget

CPU = torch.device("cpu")
LAYERS = (1, 2, 3, 4, 5)


def main() -> None:
    """Parse the command line and run."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="demo")
    made.add_argument("--facts", required=True, type=Path)
    made.add_argument("--text", required=True, type=Path)
    made.add_argument("--methods", default="memit,alphaedit,rome,ft-m")
    made.add_argument("--limit", type=int, default=20)
    made.add_argument("--steps", type=int, default=3)
    made.add_argument("--tokens", type=int, default=None)
    made.add_argument("--budgets", default="auto")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--json", action="store_true")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", kecore.KecoreWarning)
    if not reset_peak():
        raise SystemExit("this system does not let a process reset its peak memory")
    rows = [row for budget in options.budgets.split(",") for row in measure(byte_count(budget), options)]
    for row in rows:
        sys.stdout.write((json.dumps(row) if options.json else text(row)) + "\n")


def measure(budget: int | None, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every stage under one budget."""
    records = list(load_records(options.facts, limit=options.limit))
    editor = Editor.from_pretrained(options.model, dtype="float32", memory=budget)
    view, tokens = editor.view, options.tokens or token_budget(editor.view)
    rows: list[dict[str, Any]] = []

    def run(name: str, needs: list[Need], work: Callable[[int], object]) -> None:
        plan = editor.memory_plan(needs)
        estimate = max(need.bytes(plan.activations) for need in plan.needs)
        reset_peak()
        before = resident_bytes(CPU)
        work(plan.activations)
        most = peak()
        rows.append(
            {
                "stage": name,
                "budget": budget,
                "micro_batch_tokens": {need.stage: need.micro_batch(plan.activations) for need in plan.needs},
                "estimated_bytes": estimate,
                "measured_bytes": most - before,
                "factor": round(estimate / max(1, most - before), 2),
                "process_bytes": most,
                "within_budget": budget is None or most <= budget,
            }
        )

    def collect(activations: int) -> None:
        editor.statistics = collect_statistics(
            view, editor.encoder, Corpus.of(options.text), LAYERS, tokens=tokens, memory=activations
        )

    run("statistics", [collection_need(view, LAYERS, tokens)], collect)
    run("score", [scoring_need(view, BATCH_TOKENS)], lambda _: editor.evaluate(records))
    for method in options.methods.split(","):
        config = {"steps": options.steps, "layers": LAYERS} if method != "ft-m" else {"steps": options.steps}
        config = {**config, "layers": LAYERS[-1:]} if method == "rome" else config
        needs = list(editor.preflight(records, method, **config).needs)
        run(method, needs, lambda _, m=method, c=config: editor.edit(records, m, **c))
        editor.revert()
    return rows


def text(row: dict[str, Any]) -> str:
    """A row for people."""
    estimate, measured, whole = (row[f"{name}_bytes"] / 2**20 for name in ("estimated", "measured", "process"))
    above = "" if row["within_budget"] else ", ABOVE THE BUDGET"
    return (
        f"{row['stage']}: estimated {estimate:.0f} MiB, measured {measured:.0f} MiB, factor {row['factor']}; "
        f"process {whole:.0f} MiB{above} {row['micro_batch_tokens']}"
    )


if __name__ == "__main__":
    main()
