"""kecore against the published one-at-a-time procedures, on the same facts, model, statistics and threads, in one run.

    python benchmarks/vs_serial.py --facts FILE --text FILE [--methods memit,rome,alphaedit] [--limit 100] --json

Both sides write all facts and are scored afterwards; loading and statistics are not counted, everything else is. One
JSON object a method: `method`, `n`, `kecore_s_per_fact`, `serial_s_per_fact`, `ratio`, `kecore_scores`,
`serial_scores`, and the conditions. `--serial-limit` lets the baseline write only the first facts: its cost per fact
hardly depends on their number, its scores are then those of these facts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_common import conditions, forget_contexts, scores, statistics_of, warm_up
from serial import PUBLISHED, Serial

import kecore
from kecore import Editor, Protocol, load_records
from kecore.engine import contexts


def main() -> None:
    """Parse the command line and run."""
    options = parser().parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", kecore.KecoreWarning)
    records = list(load_records(options.facts, limit=options.limit))
    editor = Editor.from_pretrained(options.model, dtype="float32")
    top = 1 + max(layer for s in PUBLISHED.values() for layer in s.layers)
    layers = range(min(len(editor.view.layers), max(top, len(editor.view.layers) // 2)))
    editor.statistics = statistics_of(editor, options.text, layers, options.tokens, options.cache)
    config: dict[str, Any] = {"precision": options.precision} if options.precision else {}
    warm_up(editor, records[:1], "memit", **config)
    editor.evaluate(records[:1])
    for method in options.methods.split(","):
        row = compare(editor, method, records, config, options)
        text = json.dumps({**row, "conditions": conditions(editor, options)}) if options.json else line(row)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="demo")
    made.add_argument("--facts", required=True, type=Path)
    made.add_argument("--text", required=True, type=Path)
    made.add_argument("--methods", default="memit")
    made.add_argument("--limit", type=int, default=100)
    made.add_argument("--serial-limit", type=int, default=None)
    made.add_argument(
        "--serial-lambda", type=float, default=1500.0, help="MEMIT's; the published 15000 writes too little"
    )
    made.add_argument("--serial-contexts", type=int, default=None, help="by default 5, and 20 for ROME")
    made.add_argument("--steps", type=int, default=None, help="of both sides")
    made.add_argument("--precision", default=None, help="of kecore's values, such as bfloat16")
    made.add_argument("--preset", default=None, help="a published set-up for kecore's side, such as llama-2-7b")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--tokens", type=int, default=None)
    made.add_argument("--cache", type=Path, default=Path("out/statistics"))
    made.add_argument("--json", action="store_true")
    return made


def compare(
    editor: Editor, method: str, records: list[Any], config: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """One method on both sides."""
    protocol = Protocol()
    if options.steps:
        config = {**config, "steps": options.steps}
    forget_contexts()
    begin = time.perf_counter()
    editor.edit(records, method, preset=options.preset, **config)
    kecore_seconds = time.perf_counter() - begin
    stages = {name: round(value, 3) for name, value in editor.history[-1].stages.items()}
    found = scores(editor.evaluate(records, protocol))
    editor.revert()

    few = records[: options.serial_limit]
    settings = replace(PUBLISHED[method], steps=options.steps or PUBLISHED[method].steps)
    if method == "memit":
        settings = replace(settings, weight=options.serial_lambda)
    count = options.serial_contexts if options.serial_contexts is not None else 20 if method == "rome" else 5
    begin = time.perf_counter()
    with editor.view.frozen():
        prefixes = contexts.sample(editor.view, editor.encoder, count, 10, editor.seed)
        if editor.statistics is None:
            raise SystemExit("no statistics")
        serial = Serial(editor.view, editor.encoder, editor.statistics, prefixes, settings)
        with serial.restoring(), torch.no_grad():
            getattr(serial, method)([record.request for record in few])
            serial_seconds = time.perf_counter() - begin
            theirs = scores(editor.evaluate(few, protocol))
    mine, other = kecore_seconds / len(records), serial_seconds / len(few)
    return {
        "method": method,
        "n": len(records),
        "serial_n": len(few),
        "kecore_s_per_fact": round(mine, 4),
        "serial_s_per_fact": round(other, 4),
        "ratio": round(other / mine, 3),
        "kecore_scores": found,
        "serial_scores": theirs,
        "kecore_stages": stages,
    }


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    return (
        f"{row['method']}: n = {row['n']}, kecore {row['kecore_s_per_fact']} s a fact {row['kecore_scores']}, serial "
        f"(n = {row['serial_n']}) {row['serial_s_per_fact']} s a fact {row['serial_scores']}, ratio {row['ratio']}"
    )


if __name__ == "__main__":
    main()
