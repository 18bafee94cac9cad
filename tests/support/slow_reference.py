"""Metrics from their definition: one prompt at a time, no batch, no padding, no cache, no sharing.

Nothing of kecore.evaluate is used. A continuation's tokens are those that follow the prompt's in the whole text, or,
where the two would share a token, those of ``" " + target`` by itself, as in the official code of ROME and MEMIT;
next to Chinese characters there is no space.
"""

from __future__ import annotations

import math
import random
import unicodedata
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from kecore.api.types import EditRecord, Probe


def chinese(text: str) -> bool:
    return "\u4e00" <= text <= "\u9fff"


def tokens_of(tokenizer: Any, prompt: str, target: str) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the continuation."""
    start = tokenizer(prompt)["input_ids"]
    space = "" if chinese(prompt[-1]) or chinese(target[0]) else " "
    whole = tokenizer(prompt + space + target)["input_ids"]
    if whole[: len(start)] == start:
        return start, whole[len(start) :]
    alone = tokenizer(space + target, add_special_tokens=False)["input_ids"]
    marked = not space and tokenizer.convert_ids_to_tokens(alone[0]) == "▁"  # SentencePiece's space before every text
    return start, alone[marked:]


def logits_of(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Logits ``[tokens, vocab]`` of one text."""
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0].double()


def log_probs(model: Any, tokenizer: Any, prompt: str, target: str) -> tuple[list[float], list[bool]]:
    """Log-probability of each target token, and whether it is the argmax."""
    start, tail = tokens_of(tokenizer, prompt, target)
    logits = logits_of(model, start + tail)
    values, correct = [], []
    for k, token in enumerate(tail):
        row = logits[len(start) + k - 1]
        values.append(float(torch.log_softmax(row, -1)[token]))
        correct.append(int(row.argmax()) == token)
    return values, correct


def guesses(model: Any, tokenizer: Any, prompt: str, target: str) -> list[int]:
    """The most probable token in each place of the target."""
    start, tail = tokens_of(tokenizer, prompt, target)
    return logits_of(model, start + tail)[len(start) - 1 : -1].argmax(-1).tolist()


def spellings(record: EditRecord) -> tuple[list[str], list[str]]:
    """All that counts as the target, and as the old answer."""
    for probe in record.probes:
        if probe.kind == "edit":
            return list(probe.answers), list(probe.rivals)
    truth = record.request.ground_truth
    return [record.request.target], [truth] if truth else []


def counterfact(model: Any, tokenizer: Any, records: Sequence[EditRecord]) -> dict[str, float]:
    """Scores of ``records`` by kecore's names."""
    found: dict[str, list[float]] = {}
    for record in records:
        request = record.request
        groups = {
            "edit": [request.text],
            "paraphrase": record.prompts_of("paraphrase"),
            "neighbourhood": record.prompts_of("neighbourhood"),
        }
        for group, prompts in groups.items():
            wins, gaps, strict, tokens, perplexities = [], [], [], [], []
            for prompt in prompts:
                answers, rival = spellings(record)[0], request.ground_truth or ""
                if group == "neighbourhood":
                    answers, rival = spellings(record)[1] or [rival], request.target
                chances = [log_probs(model, tokenizer, prompt, answer) for answer in answers]
                right, wrong = chances[0][0], log_probs(model, tokenizer, prompt, rival)[0]
                wins.append(float(fmean(right) > fmean(wrong)))
                gaps.append(math.exp(fmean(right)) - math.exp(fmean(wrong)))
                strict.append(float(any(all(correct) for _, correct in chances)))
                tokens.append(max(fmean(correct) for _, correct in chances))
                perplexities.append(math.exp(-fmean(right)))
            prefix = "" if group == "edit" else f"{group}_"
            names = {f"{group}_success": wins, f"{group}_magnitude": gaps}
            if group == "neighbourhood":
                names["neighbourhood_accuracy"] = strict
            else:
                names |= {
                    f"{prefix}strict_accuracy": strict,
                    f"{prefix}token_accuracy": tokens,
                    f"{prefix}perplexity": perplexities,
                }
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


def written(model: Any, tokenizer: Any, prompt: str, steps: int) -> str:
    """Greedy text up to the end of its first line."""
    text = tokenizer.decode(greedy(model, tokenizer, prompt, steps), skip_special_tokens=True)
    return text.lstrip().partition("\n")[0].strip()


def passage(model: Any, tokenizer: Any, prompt: str, length: int, seed: int) -> str:
    """A text of ``length`` tokens, the prompt's included, each drawn from the five most probable ones."""
    ids, stream = list(tokenizer(prompt)["input_ids"]), random.Random(f"{seed} {prompt}")
    new: list[int] = []
    while len(ids) + len(new) < length and (not new or new[-1] != tokenizer.eos_token_id):
        row = logits_of(model, ids + new)[-1]
        best = sorted(range(len(row)), key=lambda i: -float(row[i]))[:5]
        shares = [math.exp(float(row[i] - row[best[0]])) for i in best]
        drawn = stream.random() * sum(shares)
        new.append(next(best[k] for k in range(len(best)) if drawn <= sum(shares[: k + 1]) or k == len(best) - 1))
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def entropy(parts: Sequence[str], n: int) -> float:
    """Entropy of the n-grams of a text, in bits."""
    grams = [tuple(parts[i : i + n]) for i in range(len(parts) - n + 1)]
    return -sum(grams.count(g) / len(grams) * math.log2(grams.count(g) / len(grams)) for g in set(grams))


def split(text: str) -> list[str]:
    """Words, punctuation marks and Chinese characters."""
    parts: list[str] = []
    joined = False
    for c in unicodedata.normalize("NFC", text):
        word = c.isalnum() and not chinese(c)
        if word and joined:
            parts[-1] += c
        elif not c.isspace():
            parts.append(c)
        joined = word
    return parts


def begins(text: str, answer: str) -> bool:
    """Whether a text begins with an answer, in whole words, without regard to case and punctuation."""
    one, other = ([w for w in split(t.casefold()) if w[0].isalnum() and w not in ("a", "an", "the")]
                  for t in (text, answer))  # fmt: skip
    return one[: len(other)] == other != []


class Slow:
    """Every metric of records on an edited model and its base, one prompt at a time."""

    def __init__(self, model: Any, base: Any, tokenizer: Any, steps: int, length: int = 100) -> None:
        self.model, self.base, self.tokenizer = model, base, tokenizer
        self.steps, self.length = steps, length

    def probe(self, name: str, prompt: str, answers: Sequence[str], *, stable: bool = False) -> dict[str, float]:
        """Values of one prompt, by suffix."""
        model, tokenizer = self.model, self.tokenizer
        found: dict[str, float] = {}
        if answers:
            marks = [log_probs(model, tokenizer, prompt, a)[1] for a in answers]
            found["strict"] = float(any(all(m) for m in marks))
            found["token"] = max(fmean(m) for m in marks)
        if not stable:
            text = written(model, tokenizer, prompt, self.steps)
            found["free"] = float(any(begins(text, a) for a in answers))
            return found
        if answers:
            pairs = zip(*(guesses(m, tokenizer, prompt, answers[0]) for m in (self.base, model)), strict=True)
            found["stable"] = fmean(a == b for a, b in pairs)
        else:
            texts = [written(m, tokenizer, prompt, self.steps) for m in (self.base, model)]
            found["stable"] = float(texts[0] == texts[1])
        p, q = (torch.log_softmax(logits_of(m, tokenizer(prompt)["input_ids"])[-1], -1) for m in (self.base, model))
        found["kl"] = sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
        return found

    def opinion(self, record: EditRecord, prompt: str, truth: str) -> float:
        """SERAC's edit success of a sentiment: the product of z_sentiment and z_topic."""

        def mean(model: Any, replies: Sequence[str]) -> float:
            return fmean(value for reply in replies for value in log_probs(model, self.tokenizer, prompt, reply)[0])

        new, old_replies = spellings(record)
        after, before = mean(self.model, new), mean(self.base, new)
        old = mean(self.model, old_replies)
        return math.exp(after) / (math.exp(after) + math.exp(old)) * min(1, math.exp(after) / math.exp(before))

    def test(self, name: str, probes: Sequence[Probe], *, stable: bool) -> dict[str, float]:
        """Values of a test of one or more prompts; nothing where its conditions do not hold on the base model."""
        for condition in probes[0].conditions:
            text = written(self.base, self.tokenizer, condition.prompt, self.steps)
            if not any(begins(text, a) for a in condition.answers):
                return {}
        parts = [self.probe(name, p.prompt, p.answers, stable=stable) for p in probes]
        return {key: (max if probes[0].need == "any" else min)(part[key] for part in parts) for key in parts[0]}

    def record(self, record: EditRecord) -> dict[str, float]:
        """All values of one record beside those of :func:`counterfact`."""
        found: dict[str, list[float]] = {}

        def put(key: str, value: float) -> None:
            found.setdefault(key, []).append(value)

        request = record.request
        put("free_generation", self.probe("edit", request.text, spellings(record)[0])["free"])
        for prompt in record.prompts_of("paraphrase"):
            put("paraphrase_free_generation", self.probe("", prompt, spellings(record)[0])["free"])
            if request.ground_truth:
                put("opinion", self.opinion(record, prompt, request.ground_truth))
        for prompt in record.prompts_of("neighbourhood"):
            values = self.probe("", prompt, [request.ground_truth or ""], stable=True)
            put("neighbourhood_stability", values["stable"])
            put("neighbourhood_kl", values["kl"])
        names = {
            "portability": {"token": "portability", "strict": "portability_strict_accuracy",
                            "free": "portability_free_generation"},
            "locality": {"stable": "locality", "token": "locality_accuracy", "strict": "locality_strict_accuracy",
                         "kl": "locality_kl"},
        }  # fmt: skip
        for kind in names:
            axes_of_tests: dict[str, dict[str, list[Probe]]] = {}
            for i, probe in enumerate(p for p in record.probes if p.kind == kind):
                axes_of_tests.setdefault(probe.axis, {}).setdefault(probe.test or str(i), []).append(probe)
            tests = [
                [self.test("", probes, stable=kind == "locality") for probes in by_test.values()]
                for by_test in axes_of_tests.values()
            ]
            for key, name in names[kind].items():
                axes = []
                for values in tests:
                    kept = [v[key] for v in values if key in v]
                    axes += [fmean(kept)] if kept else []
                if axes:
                    put(name, fmean(axes))
        for test in dict.fromkeys(p.test for p in record.probes if p.kind == "multi_hop"):
            chain = [p for p in record.probes if p.test == test]
            asked = [self.probe("", p.prompt, p.answers) for p in chain if p.kind == "multi_hop"]
            put("multi_hop", max(v["free"] for v in asked))
            put("multi_hop_strict_accuracy", max(v["strict"] for v in asked))
            hops = [self.probe("", p.prompt, p.answers) for p in chain if p.kind == "hop"]
            put("hop_accuracy", min(v["free"] for v in hops))
            put("hop_strict_accuracy", min(v["strict"] for v in hops))
        for prompt in record.prompts_of("generation") or (request.text,):
            text = passage(self.model, self.tokenizer, prompt, self.length, 0)
            parts = split(f"{prompt} {text}")
            put("fluency", (2 / 3 * entropy(parts, 2) + 4 / 3 * entropy(parts, 3)) / 2)
        return {key: fmean(values) for key, values in found.items()}

    def records(self, records: Sequence[EditRecord]) -> dict[str, float]:
        """Every score: means over the records that have a value."""
        rows = [self.record(record) for record in records]
        means = {key: fmean(r[key] for r in rows if key in r) for key in dict.fromkeys(k for r in rows for k in r)}
        return means | counterfact(self.model, self.tokenizer, records)
