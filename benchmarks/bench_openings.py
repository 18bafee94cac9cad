"""What reading the common beginning of prompts once spares: in-context edits scored with and without it, in one run.

    python benchmarks/bench_openings.py --facts counterfact.json.gz [--examples counterfact-6k.json.gz]
        [--methods ice,ike] [--edits 50] [--records 2] [--threads 1]

The first facts are edited together, and of them as many records are scored, all prompts, texts of eight tokens after
the edit prompt. The other side is the same evaluation of a model with a hook that does nothing: whoever hooks into a
model is given whole prompts. Every log-probability is compared before a time is printed. CPU seconds say more than wall
seconds on a machine with other work.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from bench_common import conditions, scores

import kecore
from kecore import Editor, EditRecord, Protocol, load_records
from kecore.evaluate import Evaluation

PROTOCOL = Protocol(generate=("edit",), max_new_tokens=8)


def main() -> None:
    """Parse the command line, run both sides of each method, compare, print."""
    options = parser().parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", kecore.KecoreWarning)
    records = list(load_records(options.facts, limit=options.edits))
    editor = Editor.from_pretrained(options.model, dtype="float32")
    editor.examples = tuple(load_records(options.examples)) if options.examples else ()
    editor.evaluate(records[:1], PROTOCOL)  # what only the first evaluation of a process has to do
    rows = [row(editor, method, records, options.records) for method in options.methods.split(",")]
    out = {"conditions": conditions(editor, options), "edits": len(records), "rows": rows}
    sys.stdout.write(json.dumps(out, indent=None if options.json else 1) + "\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="demo")
    made.add_argument("--facts", required=True, type=Path)
    made.add_argument("--examples", type=Path, default=None, help="facts that ike takes its demonstrations from")
    made.add_argument("--methods", default="ice")
    made.add_argument("--edits", type=int, default=50, help="facts of the edit")
    made.add_argument("--records", type=int, default=2, help="that are scored")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--json", action="store_true", help="on one line")
    return made


def row(editor: Editor, method: str, records: list[EditRecord], count: int) -> dict[str, Any]:
    """One edit, scored both ways."""
    editor.edit(records, method)
    found, seconds = scored(editor, records[:count])
    handle = editor.model.register_forward_hook(lambda *_: None)
    wanted, whole = scored(editor, records[:count])
    handle.remove()
    editor.revert()
    return {
        "method": method,
        "records": count,
        "cpu_seconds": round(seconds, 2),
        "cpu_seconds_whole_prompts": round(whole, 2),
        "ratio_cpu": round(whole / seconds, 2),
        "largest_difference": difference(found, wanted),
        "scores": scores(found),
    }


def scored(editor: Editor, records: list[EditRecord]) -> tuple[Evaluation, float]:
    """An evaluation, and what it took."""
    begin = time.process_time()
    found = editor.evaluate(records, PROTOCOL)
    return found, time.process_time() - begin


def difference(found: Evaluation, wanted: Evaluation) -> float:
    """Of all log-probabilities the largest that both sides differ by; texts must be equal."""
    worst = 0.0
    for one, other in zip(found.rows, wanted.rows, strict=True):
        for a, b in zip(one.probes, other.probes, strict=True):
            if a.text != b.text:
                raise SystemExit(f"{a.prompt!r}: the texts differ, {a.text!r} and {b.text!r}")
            for x, y in zip(a.scores, b.scores, strict=True):
                worst = max(worst, *(abs(p - q) for p, q in zip(x.log_probs, y.log_probs, strict=True)))
    if not worst < 1e-3:
        raise SystemExit(f"the two sides differ by {worst:.1e}")
    return worst


if __name__ == "__main__":
    main()
