"""Answers prompts with a model as another program would load it: transformers, and peft on it, without kecore.

Run as a script in a fresh process by :mod:`kecore.serving.verify`; nothing here may import kecore.

    python foreign.py JOB.json ANSWERS.safetensors

JOB.json holds ``prompts``, lists of token ids, and ``models``: of each the ``model`` that is loaded and the ``adapter``
beside it, or null. The answers are ``logits/0``, ``tokens/0`` and so on.
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


def load(model: str, adapter: str | None) -> Any:
    """Load a checkpoint in the type that it is stored in, or with an adapter on it in float32."""
    from transformers import AutoModelForCausalLM

    dtype = "auto" if adapter is None else torch.float32
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    if adapter is None:
        return loaded
    from peft import PeftModel  # pyright: ignore[reportMissingImports, reportUnknownVariableType] - an extra

    return PeftModel.from_pretrained(loaded, adapter).eval()


def main() -> None:
    """Load what the job names, answer, and write the answers."""
    from safetensors.torch import save_file

    path, out = sys.argv[1:]
    with open(path, encoding="utf-8") as file:
        job = json.load(file)
    answers: dict[str, Tensor] = {}
    for index, named in enumerate(job["models"]):
        logits, tokens = answer(load(named["model"], named["adapter"]), job["prompts"])
        answers |= {f"logits/{index}": logits, f"tokens/{index}": tokens}
    save_file(answers, out)


if __name__ == "__main__":
    main()
