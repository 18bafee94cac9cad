"""Answers prompts with a model as another program would load it: transformers and peft, without kecore.

Run as a script in a fresh process by :mod:`kecore.served`; nothing here may import kecore.

    python foreign.py BASE ADAPTER PROMPTS.json ANSWERS.safetensors
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor

__all__ = ["answer", "main"]

_TOKENS = 8  # that are written behind each prompt


@torch.no_grad()
def answer(model: Any, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return the logits behind each prompt, and the tokens that follow it greedily.

    Args:
        model: a causal language model.
        prompts: token ids, one list a prompt.

    Returns:
        Logits ``[prompts, vocab]`` float32, and tokens ``[prompts, 8]``.
    """
    logits: list[Tensor] = []
    written: list[list[int]] = []
    for prompt in prompts:
        ids = list(prompt)
        for step in range(_TOKENS):
            last = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()  # [vocab]
            if step == 0:
                logits.append(last)
            ids.append(int(last.argmax()))
        written.append(ids[len(prompt) :])
    return torch.stack(logits), torch.tensor(written)


def main() -> None:
    """Load the base and the adapter, answer, and write the answers."""
    from peft import PeftModel  # pyright: ignore[reportMissingImports, reportUnknownVariableType] - an extra
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    base, adapter, prompts, out = sys.argv[1:]
    with open(prompts, encoding="utf-8") as file:
        ids = json.load(file)
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    logits, tokens = answer(PeftModel.from_pretrained(plain, adapter).eval(), ids)
    save_file({"logits": logits, "tokens": tokens}, out)


if __name__ == "__main__":
    main()
