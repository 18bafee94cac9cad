"""How much faster kecore scores records than one prompt at a time: the ratio of both in one run, results compared.

    python benchmarks/bench_evaluate.py --facts counterfact.json.gz [--records 200] [--serial 200] [--threads 2]

Both sides answer every prompt of the records (two answers after each edit prompt, paraphrase and neighbour, and greedy
text after the edit prompt and its paraphrases) and work out the same scores, which must agree before any time is
printed. The serial side is what the official code of ROME and MEMIT does per prompt, without its padding: one forward
pass for each pair of prompt and answer, and `model.generate` for each text. It may be timed on fewer records, spread
evenly; the ratio is then of seconds per record. CPU seconds say more than wall seconds on a machine with other work.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import kecore
from kecore import Editor, EditRecord, Protocol, load_records
from kecore.environment import environment
from kecore.evaluate.matching import matches

PROTOCOL = Protocol()


def main() -> None:
    """Parse the command line, run both sides, compare, print."""
    options = parser().parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", kecore.KecoreWarning)
    records = [of_counterfact(record) for record in load_records(options.facts, limit=options.records)]
    chosen = [i * len(records) // options.serial for i in range(min(options.serial, len(records)))]
    editor = Editor.from_pretrained(options.model, dtype="float32")
    editor.evaluate(records[:1], PROTOCOL)  # what only the first evaluation of a process has to do
    Serial(editor).record(records[0])

    begin = time.perf_counter(), time.process_time()
    found = editor.evaluate(records, PROTOCOL)
    ours = time.perf_counter() - begin[0], time.process_time() - begin[1]

    serial = Serial(editor)
    begin = time.perf_counter(), time.process_time()
    rows = [serial.record(records[i]) for i in chosen]
    theirs = time.perf_counter() - begin[0], time.process_time() - begin[1]

    worst = difference(rows, [found.values[i] for i in chosen])
    wall, cpu = ((theirs[k] / len(chosen)) / (ours[k] / len(records)) for k in (0, 1))
    out = {
        "conditions": {**environment(editor.view.device), "model": options.model, "threads": options.threads},
        "records": len(records),
        "probes": sum(len(row.probes) for row in found.rows),
        "serial_records": len(chosen),
        "batched_seconds": round(ours[0], 2),
        "batched_cpu_seconds": round(ours[1], 2),
        "serial_seconds": round(theirs[0], 2),
        "serial_cpu_seconds": round(theirs[1], 2),
        "ratio_wall": round(wall, 2),
        "ratio_cpu": round(cpu, 2),
        "largest_difference": worst,
        "scores": {key: round(score.value, 4) for key, score in found.scores.items()},
    }
    sys.stdout.write(json.dumps(out, indent=None if options.json else 1) + "\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="demo")
    made.add_argument("--facts", required=True, type=Path, help="CounterFact, in any layout that holds all prompts")
    made.add_argument("--records", type=int, default=200)
    made.add_argument("--serial", type=int, default=200, help="records of the serial side")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--json", action="store_true", help="in one line")
    return made


def of_counterfact(record: EditRecord) -> EditRecord:
    """A record with CounterFact's own prompts: some files add questions of other kinds."""
    return record.with_probes("portability", ()).with_probes("locality", ())


class Serial:
    """One prompt at a time, straight from the model's own interface."""

    def __init__(self, editor: Editor) -> None:
        self.model: Any = editor.model
        self.tokenizer = editor.encoder.tokenizer

    def record(self, record: EditRecord) -> dict[str, float]:
        """The values of one record."""
        request = record.request
        target, truth = request.target, request.ground_truth or ""
        found: dict[str, list[float]] = {}
        groups: dict[str, Sequence[str]] = {
            "edit": [request.text],
            "paraphrase": record.prompts_of("paraphrase"),
            "neighbourhood": record.prompts_of("neighbourhood"),
        }
        for group, prompts in groups.items():
            for prompt in prompts:
                new, true = self.score(prompt, target), self.score(prompt, truth)
                right, wrong = (true, new) if group == "neighbourhood" else (new, true)
                values = {
                    f"{group}_success": float(right[0] > wrong[0]),
                    f"{group}_magnitude": math.exp(right[0]) - math.exp(wrong[0]),
                }
                if group == "neighbourhood":
                    values["neighbourhood_accuracy"] = float(all(right[1]))
                else:
                    prefix = "" if group == "edit" else f"{group}_"
                    values[f"{prefix}strict_accuracy"] = float(all(right[1]))
                    values[f"{prefix}token_accuracy"] = fmean(right[1])
                    values[f"{prefix}perplexity"] = math.exp(-right[0])
                    values[f"{prefix}free_generation"] = float(matches(self.text(prompt), target, PROTOCOL.match))
                for key, value in values.items():
                    found.setdefault(key, []).append(value)
        return {key: fmean(values) for key, values in found.items()}

    @torch.no_grad()
    def score(self, prompt: str, target: str) -> tuple[float, list[bool]]:
        """Mean log-probability of the target's tokens, and which of them are the argmax."""
        start = self.tokenizer(prompt)["input_ids"]
        tail = self.tokenizer(" " + target, add_special_tokens=False)["input_ids"]
        logits = self.model(torch.tensor([start + tail])).logits[0, len(start) - 1 : -1].log_softmax(-1)
        ids = torch.tensor(tail)
        values = logits[torch.arange(len(tail)), ids]
        return float(values.double().mean()), (logits.argmax(-1) == ids).tolist()

    def text(self, prompt: str) -> str:
        """Greedy text to the end of the line."""
        encoded = self.tokenizer(prompt, return_tensors="pt")
        ids = self.model.generate(
            **encoded,
            do_sample=False,
            max_new_tokens=PROTOCOL.max_new_tokens,
            pad_token_id=self.tokenizer.eos_token_id,
        )[0, encoded["input_ids"].shape[1] :]
        return self.tokenizer.decode(ids, skip_special_tokens=True).lstrip().partition("\n")[0]


def difference(rows: Sequence[dict[str, float]], ours: Sequence[dict[str, float]]) -> float:
    """The largest difference of any value of any record, relative to what is above 1; refuses more than rounding."""
    for row, own in zip(rows, ours, strict=True):
        if row.keys() != own.keys():
            raise SystemExit(f"the two sides measured different things: {sorted(row.keys() ^ own.keys())}")
    worst = max(
        abs(row[key] - own[key]) / max(1.0, abs(row[key])) for row, own in zip(rows, ours, strict=True) for key in row
    )
    if not worst < 1e-4:
        raise SystemExit(f"the two sides differ by {worst:.1e}")
    return worst


if __name__ == "__main__":
    main()
