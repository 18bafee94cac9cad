"""How well the methods edit: the table of docs/results.md, made by one command.

    python benchmarks/quality.py --facts FILE --text FILE [--methods memit,rome] [--limit 100] [--out docs]

Methods that solve batches edit all records at once; the others edit and score one record at a time, taking each
edit off again. Statistics are collected first and timed apart.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

import kecore
from kecore import Corpus, Editor, KeyStatistics, Protocol, load_records, registry
from kecore.evaluate import Evaluation, merge

COLUMNS = {
    "ES": "edit_success",
    "PS": "paraphrase_success",
    "NS": "neighbourhood_success",
    "strict": "strict_accuracy",
    "strict, paraphrase": "paraphrase_strict_accuracy",
    "free generation": "free_generation",
}


def main() -> None:
    """Parse the command line, run, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--facts", required=True, type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--methods", default="rome,memit,emmet,alphaedit,ft-m")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--cache", type=Path, default=Path("out/statistics"))
    parser.add_argument("--out", type=Path, default=None, help="folder for results.json and results.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", kecore.KecoreWarning)

    records = list(load_records(options.facts, limit=options.limit))
    editor = Editor.from_pretrained(options.model, dtype="float32")
    seconds = statistics(editor, options)
    rows: dict[str, Any] = {"unedited": row(editor.evaluate(records, Protocol()), 0.0)}
    show("unedited", rows["unedited"])
    for method in options.methods.split(","):
        rows[method] = run(editor, method, records)
        show(method, rows[method])
    result = {
        "facts": options.facts.name,
        "n": len(records),
        "statistics": {"text": options.text.name, "tokens": tokens(editor), "seconds": round(seconds, 1)},
        "protocol": Protocol().to_json() | {"hash": Protocol().hash()},
        "kecore": kecore.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{options.threads} threads, {cpu()}",
        "methods": rows,
    }
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.out / "results.md").write_text(table(result))


def statistics(editor: Editor, options: argparse.Namespace) -> float:
    """Collect statistics for every layer that a default configuration may edit; seconds."""
    begin = time.perf_counter()
    top = len(editor.view.layers) // 2
    editor.statistics = KeyStatistics.collect(
        editor.view, editor.encoder, Corpus.of(options.text), range(top), tokens=options.tokens, out=options.cache
    )
    return time.perf_counter() - begin


def tokens(editor: Editor) -> int:
    """Tokens of the statistics in use."""
    return editor.statistics.tokens if editor.statistics else 0


def run(editor: Editor, method: str, records: list[Any]) -> dict[str, Any]:
    """Edit with one method, score, and take the edit off."""
    batch = registry.default().get(method).capabilities.batch
    spent = 0.0
    parts: list[Evaluation] = []
    stages: dict[str, float] = {}
    for group in [records] if batch else [[record] for record in records]:
        begin = time.perf_counter()
        editor.edit(group, method)
        spent += time.perf_counter() - begin
        for name, value in editor.history[-1].stages.items():
            stages[name] = stages.get(name, 0.0) + value
        parts.append(editor.evaluate(group, Protocol()))
        editor.revert()
    out = row(merge(parts), spent / len(records))
    return out | {"stages": {k: round(v, 2) for k, v in stages.items()}, "protocol": "batch" if batch else "single"}


def row(evaluation: Evaluation, per_fact: float) -> dict[str, Any]:
    """The figures of one line."""
    scores = evaluation.scores
    return {
        **{name: round(scores[key].value, 4) for name, key in COLUMNS.items() if key in scores},
        "seconds per fact": round(per_fact, 2),
        "peak memory, GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def table(result: dict[str, Any]) -> str:
    """The table as Markdown."""
    head = [*COLUMNS, "seconds per fact", "peak memory, GB"]
    lines = [
        f"| method | edits | {' | '.join(head)} |",
        "| --- | --- |" + " --- |" * len(head),
    ]
    for name, values in result["methods"].items():
        how = values.get("protocol", "-")
        lines.append(f"| {name} | {how} | " + " | ".join(str(values.get(key, "-")) for key in head) + " |")
    return "\n".join(lines) + "\n"


def show(name: str, values: dict[str, Any]) -> None:
    """One line of progress."""
    sys.stderr.write(f"{name}: {values}\n")


def cpu() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
