"""Every registered method keeps what it declares."""

from __future__ import annotations

from typing import Any

import torch

from kecore.api import registry
from kecore.api.line import MethodLine
from kecore.engine import LocateConfig
from kecore.testing import Trial, parametrize_with_checks
from kecore.testing.bench import MODELS
from kecore.testing.conformance import Case

_EVERYWHERE = {"targets_become_likelier": "the fact stands before every prompt, related or not, as the paper has it"}
_ANY_PROMPT = {
    "targets_become_likelier": "neurons are read at the last token, where those of other prompts act as well"
}
_NO_QUESTIONS = dict.fromkeys(
    [
        "targets_become_likelier",
        "every_request_of_a_batch_counts",
        "second_edit_keeps_the_first",
        "declared_types_work",
        "facts_without_a_subject_are_edited_or_refused",
        *(["works_on_cuda"] if torch.cuda.is_available() else []),
    ],
    "a random model takes no question apart, so no fact is ever retrieved for it",
)
# Prompts are written alike for all architectures; two models bring two kinds of tokenizers.
_PROMPT: dict[str, Any] = {"models": ("gpt2", "llama"), "config": {"encoder": "character-ngrams"}}
_SHORT = {"encoder": "character-ngrams", "demonstrations": 0, "hops": 1, "new_tokens": 8}
# They differ from MEMIT, or from LoRA, in a stage or in the loss, and reach the model in the same way: what
# architectures have of their own is tested there. A matrix that is stored transposed and a norm behind the block reach
# into stages.
_RELATIVES = (
    "adalora", "dpo", "eamet", "emmet", "encore", "evoedit", "locft-bf", "memit-fe", "nas", "ote-se", "prune", "rect",
    "simie", "sphere",
)  # fmt: skip
# Values of fewer steps and contexts than the defaults: what a method promises does not depend on their number.
_FEW = {"steps": 8, "contexts": 2, "context_tokens": 3}
_SHORTER = {"steps": 15}  # where the defaults take long for what a tiny model learns at once
# Through the engine and beside the block; all other methods reach experts in one of these ways.
_AND_EXPERTS = (*MODELS, "mixtral")
# What the defaults cannot be tested with here, and where the paper's mechanism itself keeps a promise from being kept.
TRIALS: dict[str, dict[str, Any]] = {
    "ice": {**_PROMPT, "config": {}, "expected_failures": _EVERYWHERE},
    "ike": {
        **_PROMPT,
        "config": {"encoder": "character-ngrams", "demonstrations": 1},
        "expected_failures": _EVERYWHERE,
    },
    "calinet": {"config": {"contexts": 1, "context_tokens": 2, "passages": 8, "steps": 30}},
    "defer": {"config": {"steps": 30}},
    # Only their system differs from AlphaEdit's, or MEMIT's.
    "betaedit": {"models": ("gpt2",)},
    "lyaplock": {"models": ("gpt2",)},
    "rlsedit": {"models": ("gpt2",)},
    "eamet": {"config": {**_FEW, "steps": 16}},
    "dpo": {"config": {"steps": 30}},
    "ft-l": {"config": {"steps": 18}},
    "ft-m": {"config": {"steps": 12}},
    "grace": {"config": {"steps": 25}, "models": _AND_EXPERTS},
    "memit": {"config": _FEW, "models": _AND_EXPERTS},
    "locft-bf": {"config": {"steps": 12, "contexts": 1, "context_tokens": 3}},
    "lora": {"config": {**_SHORTER, "contexts": 1, "context_tokens": 3}},
    "melo": {"config": {"contexts": 1, "context_tokens": 2, "steps": 12}},
    "mello": {**_PROMPT, "config": _SHORT, "expected_failures": _NO_QUESTIONS},
    "kn": {"models": ("gpt2", "gptj"), "expected_failures": _ANY_PROMPT},
    # The tiny models are narrower than a block of 64; beyond the base, this is what LoRA does on all of them.
    "qlora": {"models": ("gpt2", "llama"), "config": {"block": 32, **_SHORTER}},
    "pmet": {"config": {**_FEW, "steps": 16}},
    "retrieval": _PROMPT,
    "wise": {"config": _SHORTER},
    "t-patcher": {"config": {"passages": 16, "others": 4, "steps": 20}},
}


def _trial(name: str) -> Trial:
    method = registry.default_registry().get(name)
    fields = dict(TRIALS.get(name, {}))
    if issubclass(method.Config, LocateConfig):
        fields.setdefault("config", _FEW)
    if name in _RELATIVES:
        fields["models"] = ("gpt2", "gemma2")
    return Trial(method, **fields)


METHODS = [_trial(name) for name in registry.default_registry().names()]
METHODS.append(Trial(registry.default_registry().get("kn"), models=("llama", "gemma2")))  # where it keeps every promise
# A line of stages is a method too; behind a norm, as in Gemma 2, its "blue" still edits two layers.
METHODS.append(Trial(MethodLine.of("alphaedit + blue + nas + merge"), _FEW, models=("llama", "gemma2")))
# Set-ups beside the defaults that work otherwise: the second edit merges the first one's shard, and a value stands at
# every token of the row.
_MERGING = {"mode": "merge", "shards": 1, "shard_edits": 1, "contexts": 1, "context_tokens": 3, **_SHORTER}
METHODS += [
    Trial(registry.default_registry().get("wise"), _MERGING, ("llama",), label="merging"),
    Trial(registry.default_registry().get("grace"), {"replace": "all", "steps": 25}, ("gpt2",), label="everywhere"),
]


@parametrize_with_checks(METHODS)
def test_conformance(check: Case) -> None:
    check()
