"""CounterFact's metrics from their definition: one prompt at a time, no batch, no padding, no sharing.

Nothing of kecore.evaluate is used. A continuation's tokens are those of ``" " + target`` by itself, as in
the official code of ROME and MEMIT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from kecore.types import EditRecord


def log_probs(model: Any, tokenizer: Any, prompt: str, target: str) -> tuple[list[float], list[bool]]:
    """Log-probability of each target token, and whether it is the argmax."""
    start = tokenizer(prompt)["input_ids"]
    tail = tokenizer(" " + target, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([start + tail])).logits[0].double()
    values, correct = [], []
    for k, token in enumerate(tail):
        row = logits[len(start) + k - 1]
        values.append(float(torch.log_softmax(row, -1)[token]))
        correct.append(int(row.argmax()) == token)
    return values, correct


def counterfact(model: Any, tokenizer: Any, records: Sequence[EditRecord]) -> dict[str, float]:
    """Scores of ``records`` by kecore's names."""
    found: dict[str, list[float]] = {}
    for record in records:
        request = record.request
        groups = {
            "edit": [request.text],
            "paraphrase": record.rephrases,
            "neighbourhood": record.neighbourhood,
        }
        for group, prompts in groups.items():
            wins, gaps, strict, tokens = [], [], [], []
            for prompt in prompts:
                new, new_correct = log_probs(model, tokenizer, prompt, request.target)
                true, true_correct = log_probs(model, tokenizer, prompt, request.ground_truth or "")
                right, wrong, correct = (new, true, new_correct)
                if group == "neighbourhood":
                    right, wrong, correct = true, new, true_correct
                wins.append(float(fmean(right) > fmean(wrong)))
                gaps.append(math.exp(fmean(right)) - math.exp(fmean(wrong)))
                strict.append(float(all(correct)))
                tokens.append(fmean(correct))
            prefix = "" if group == "edit" else f"{group}_"
            names = {f"{group}_success": wins, f"{group}_magnitude": gaps}
            if group == "neighbourhood":
                names["neighbourhood_accuracy"] = strict
            else:
                names |= {f"{prefix}strict_accuracy": strict, f"{prefix}token_accuracy": tokens}
            for name, values in names.items():
                found.setdefault(name, []).append(fmean(values))
    scores = {name: fmean(values) for name, values in found.items()}
    parts = [scores[f"{group}_success"] for group in ("edit", "paraphrase", "neighbourhood")]
    scores["score"] = 3 / sum(1 / p for p in parts) if all(parts) else 0.0
    return scores


def greedy(model: Any, tokenizer: Any, prompt: str, steps: int) -> list[int]:
    """Token ids of greedy decoding, the whole text read again for each token."""
    ids = list(tokenizer(prompt)["input_ids"])
    new: list[int] = []
    for _ in range(steps):
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        if new[-1] == tokenizer.eos_token_id:
            break
    return new
