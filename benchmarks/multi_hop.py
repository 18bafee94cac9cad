"""How many questions of several hops are answered with the edited facts: the table of docs/methods/mello.md.

    python benchmarks/multi_hop.py --facts MQuAKE-CF-3k.json.gz [--methods ice,retrieval,mello] [--limit 6]

The facts of all records are in one store. A question counts as answered if what the model writes begins with the new
answer or one of its aliases. MQuAKE asks each question in three wordings and counts a record if any of them is
answered; here only the first is asked.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import torch

import kecore
from kecore import Editor, load_records
from kecore.edit import Reader, written
from kecore.inference import generate


def main() -> None:
    """Parse the command line, run, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--facts", required=True, type=Path)
    parser.add_argument("--limit", type=int, default=6)
    parser.add_argument("--methods", default="ice,retrieval,mello")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", kecore.KecoreWarning)

    records = list(load_records(options.facts, limit=options.limit))
    probes = [record.probes_of("multi_hop")[0] for record in records]
    questions = [probe.prompt for probe in probes]
    answers = [probe.answers for probe in probes]
    editor = Editor.from_pretrained(options.model, dtype="float32")
    reader = Reader(editor.view, editor.encoder)
    for method in ["unedited", *options.methods.split(",")]:
        begin = time.perf_counter()
        with editor:
            if method != "unedited":
                editor.edit(records, method)
            texts = written(editor.model, questions, reader)
        said = [
            item.text for item in generate(editor.view, editor.encoder, texts, max_new_tokens=8, stop_at_newline=True)
        ]
        right = [
            any(text.casefold().startswith(answer.casefold()) for answer in every)
            for text, every in zip(said, answers, strict=True)
        ]
        line = {"method": method, "n": len(records), "answered": sum(right), "s": round(time.perf_counter() - begin, 1)}
        sys.stdout.write(json.dumps(line) + "\n")
        for question, text, wrote, every in zip(questions, texts, said, answers, strict=True):
            sys.stderr.write(f"{method} | {question} | {text[-900:]!r} | {wrote!r} | {every[0]}\n")


if __name__ == "__main__":
    main()
