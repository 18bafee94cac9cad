"""How well trained editors edit, one fact at a time: the tables of docs/methods/{mend,ke,malmen}.md.

    python benchmarks/trained.py --facts FILE --limit 50 TRAINED [TRAINED ...]

``TRAINED`` are folders of ``kecore train``. Each record is edited alone on the unedited model and scored; with
``--together N`` records are edited N at a time.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch

from kecore import Editor, KecoreWarning, Protocol, TrainedEditor, load_records
from kecore.api.types import EditRecord
from kecore.evaluate import Evaluation, compare, merge

COLUMNS = {
    "edit_success": "ES",
    "paraphrase_success": "PS",
    "neighbourhood_success": "NS",
    "token_accuracy": "edit, tokens",
    "strict_accuracy": "edit, all tokens",
    "paraphrase_token_accuracy": "rephrase, tokens",
    "paraphrase_strict_accuracy": "rephrase, all tokens",
    "locality": "locality",
}


def main() -> None:
    """Parse the command line, edit, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", nargs="+", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--facts", required=True, type=Path)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--together", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", KecoreWarning)
    records = load_records(options.facts, limit=options.limit).records
    protocol = Protocol(edits="single" if options.together == 1 else "batch", max_new_tokens=0)
    editor = Editor.from_pretrained(options.model)
    parts = [records[i : i + options.together] for i in range(0, len(records), options.together)]
    before = [editor.evaluate(part, protocol) for part in parts]
    rows = {"unedited": (merge(before), 0.0)}
    for folder in options.trained:
        trained = TrainedEditor.load(folder)
        name = f"{folder.name}: {trained.method}, {trained.record['best_step']:.0f} steps"
        rows[name] = edited(editor, trained, parts, before, protocol)
    keys = [key for key in COLUMNS if any(key in scores.scores for scores, _ in rows.values())]
    lines = [
        f"{len(records)} records, {options.together} at a time, protocol {protocol.hash()}\n",
        "| | " + " | ".join(COLUMNS[key] for key in keys) + " | seconds a record |",
        "| --- " * (len(keys) + 2) + "|",
    ]
    for name, (scores, spent) in rows.items():
        cells = [f"{scores.scores[key].value:.3f}" if key in scores.scores else "-" for key in keys]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {spent / len(records):.2f} |")
    sys.stdout.write("\n".join(lines) + "\n")


def edited(
    editor: Editor,
    trained: TrainedEditor,
    parts: list[tuple[EditRecord, ...]],
    before: list[Evaluation],
    protocol: Protocol,
) -> tuple[Evaluation, float]:
    """Scores of all records, each part edited on the unedited model; and the seconds that editing took."""
    editor.trained = trained
    spent, after = 0.0, list[Evaluation]()
    for part, old in zip(parts, before, strict=True):
        begin = time.perf_counter()
        editor.edit(part, trained.method)
        spent += time.perf_counter() - begin
        after.append(compare(old, editor.evaluate(part, protocol)))
        editor.revert()
    return merge(after), spent


if __name__ == "__main__":
    main()
