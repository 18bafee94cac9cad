"""How well the methods edit that change only what the model reads: the tables of their pages in docs/methods.

    python benchmarks/in_context.py --facts FILE [--arms ice:single,retrieval:all] [--limit 50]

An arm is a method and its store. "single": each fact alone; "all": every fact in one store. A prompt edit turns each
prompt into a text and does nothing else, so the texts of all arms are scored by the unedited model in one go, and equal
ones once; tests/unit/methods/test_ice.py holds that against edits that are attached. Reported beside the scores: how
many neighbours and paraphrases are taken into an edit's scope.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import kecore
from kecore import Editor, Protocol, load_records
from kecore.api.types import EditRecord
from kecore.edit import Reader, written
from kecore.evaluate import Evaluation, evaluate
from kecore.evaluate.probes import all_probes

SCORES = {
    "ES": "edit_success",
    "PS": "paraphrase_success",
    "NS": "neighbourhood_success",
    "strict": "strict_accuracy",
    "strict, paraphrase": "paraphrase_strict_accuracy",
    "free generation": "free_generation",
}


def main() -> None:
    """Parse the command line, run, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--facts", required=True, type=Path)
    parser.add_argument("--skip", type=int, default=0, help="records to leave out at the beginning")
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--examples", type=int, default=500, help="records behind those, for methods that need them")
    parser.add_argument("--arms", default="ice:single,retrieval:single,retrieval:all")
    parser.add_argument("--set", default="{}", help="configuration of every method, as JSON")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", kecore.KecoreWarning)

    last = options.skip + options.limit
    everything = list(load_records(options.facts, limit=last + options.examples))
    records, pool = everything[options.skip : last], everything[last:]
    editor = Editor.from_pretrained(options.model, dtype="float32", chat=options.chat, examples=pool)
    arms = {"unedited": records}
    notes: dict[str, Any] = {"unedited": {}}
    for arm in options.arms.split(","):
        method, store = arm.split(":")
        begin = time.perf_counter()
        groups = [records] if store == "all" else [[record] for record in records]
        read = [texts for group in groups for texts in asked(editor, method, group, json.loads(options.set))]
        arms[arm] = read
        notes[arm] = scope(records, read) | {"edit and write, s": round(time.perf_counter() - begin, 1)}
    protocol = Protocol(
        edits="single",
        form="chat" if options.chat else "plain",
        generate=("edit",),
        max_new_tokens=options.new_tokens,
    )
    result = evaluate(editor.view, editor.encoder, [r for texts in arms.values() for r in texts], protocol)
    for place, name in enumerate(arms):
        rows = result.rows[place * len(records) : (place + 1) * len(records)]
        scores = Evaluation(protocol, rows).scores
        line = {label: round(scores[key].value, 3) for label, key in SCORES.items() if key in scores}
        sys.stdout.write(json.dumps({"method": name, "n": len(records), **line, **notes[name]}) + "\n")


def asked(editor: Editor, method: str, records: Sequence[EditRecord], config: dict[str, Any]) -> list[EditRecord]:
    """The records as a model reads them that carries an edit of all of them."""
    editor.edit(records, method, **config)
    reader = Reader(editor.view, editor.encoder)
    found: list[EditRecord] = []
    for record in records:
        probes = [probe for probe in all_probes(record) if probe.kind in ("edit", "paraphrase", "neighbourhood")]
        texts = written(editor.model, [probe.prompt for probe in probes], reader)
        asked_in_context = [replace(probe, prompt=text) for probe, text in zip(probes, texts, strict=True)]
        request = replace(record.request, prompt=texts[0])
        others = [probe for probe in record.probes if probe not in probes]
        found.append(replace(record, request=request, probes=(*asked_in_context, *others)))
    editor.revert()
    return found


def scope(before: Sequence[EditRecord], after: Sequence[EditRecord]) -> dict[str, Any]:
    """Share of paraphrases and neighbours that are not what they were."""

    def share(kind: str) -> float:
        was, now = ([text for record in records for text in record.prompts_of(kind)] for records in (before, after))
        return round(sum(a != b for a, b in zip(was, now, strict=True)) / len(was), 4)

    return {"paraphrases in scope": share("paraphrase"), "neighbours in scope": share("neighbourhood")}


if __name__ == "__main__":
    main()
