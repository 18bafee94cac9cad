"""How well the methods edit: the table of docs/results.md, made by one command.

    python benchmarks/quality.py --facts FILE --text FILE [--methods memit,rome] [--limit 100] [--out docs]

`kecore bench` under another name: methods that solve batches edit all records at once, by one protocol; the others edit
and score one record at a time, by another, and stand in a table of their own. Statistics are collected first and timed
apart. The stores lie in --cache; the same command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from kecore import Corpus, Editor, Protocol
from kecore.api.line import MethodLine
from kecore.files import write_json
from kecore.statistics import collect_statistics
from kecore_bench.plan import BASELINES, BenchPlan
from kecore_bench.processes import run_plan
from kecore_bench.report import Table, results, tables
from kecore_bench.report.table import Row
from kecore_bench.report.text import markdown
from kecore_bench.store import Store


def main() -> None:
    """Parse the command line, run, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--facts", required=True, type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--methods", default="rome,memit,emmet,alphaedit,ft-m")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--cache", type=Path, default=Path("out/quality"))
    parser.add_argument("--out", type=Path, default=None, help="folder for results.json and results.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seconds, tokens = statistics(options)
    made: list[Table] = []
    found: list[Any] = []
    for edits in ("batch", "single"):
        names = [name for name in options.methods.split(",") if chosen(name) == edits]
        if names:
            plan = planned(options, names, edits)
            with Store(options.cache / f"{edits}.sqlite", plan.protocol) as store:
                cells = run_plan(plan, store)
                ours = results(store, keys={cell.spec.key for cell in cells})
            found += ours
            made += tables(ours)
    text = "\n".join(markdown([table], [row.result for row in table.rows]) for table in made)
    sys.stdout.write(text)
    if options.out:
        collected = {"text": options.text.name, "tokens": tokens, "seconds": round(seconds, 1)}
        write_json(options.out / "results.json", summary(options, collected, made))
        (options.out / "results.md").write_text(text)


def chosen(method: str) -> str:
    """How a method is asked to edit."""
    return "batch" if MethodLine.of(method).capabilities.batch else "single"


def planned(options: argparse.Namespace, names: list[str], edits: str) -> BenchPlan:
    """The plan of the methods that edit in one way."""
    fields = {
        "models": options.model,
        "methods": names,
        "facts": str(options.facts),
        "sizes": options.limit,
        "without": BASELINES,
        "protocol": Protocol.make({"edits": edits}),
        "stats": options.cache / "statistics",
        "dtype": "float32",
    }
    return BenchPlan.make(fields)


def statistics(options: argparse.Namespace) -> tuple[float, int]:
    """Collect statistics for every layer that a default configuration may edit; seconds and tokens."""
    begin = time.perf_counter()
    editor = Editor.from_pretrained(options.model, dtype="float32")
    layers = range(len(editor.view.layers) // 2)
    corpus, out = Corpus.of(options.text), options.cache / "statistics"
    made = collect_statistics(editor.view, editor.encoder, corpus, layers, tokens=options.tokens, out=out)
    return time.perf_counter() - begin, made.tokens


def summary(options: argparse.Namespace, collected: dict[str, Any], made: list[Table]) -> dict[str, Any]:
    """What docs/results.json holds."""
    protocols = {table.first.protocol.edits: table.first.protocol for table in made}
    first = made[0].first
    return {
        "facts": options.facts.name,
        "n": first.spec.size,
        "statistics": collected,
        "protocols": {edits: protocol.to_json() | {"hash": protocol.hash()} for edits, protocol in protocols.items()},
        **first.made_on["versions"],
        "machine": f"{options.threads} threads, {first.made_on['hardware']['processor']}",
        "methods": {row.label: figures(table, row) for table in made for row in table.rows},
    }


def figures(table: Table, row: Row) -> dict[str, Any]:
    """The figures of one line."""
    result = row.result
    values: dict[str, Any] = {head: round(row.scores[key].value, 4) for key, head in table.columns.items()
                              if key in row.scores}  # fmt: skip
    if result.seconds is not None:
        values["seconds per fact"] = round(result.seconds, 2)
        values["peak memory, GB"] = round((result.peak_memory or 0) / 2**30, 2)
        values["stages"] = {name: round(seconds, 2) for name, seconds in result.stages.items()}
    return values | {"protocol": table.first.protocol.edits if result.edits else "-"}


if __name__ == "__main__":
    main()
