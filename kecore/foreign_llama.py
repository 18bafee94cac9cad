"""Answers prompts by llama.cpp itself, without kecore and without torch.

Run as a script in a fresh process by :mod:`kecore.serving.verify`; nothing here may import kecore. The job and the
answers are those of :mod:`kecore.foreign`, with GGUF files for models and adapters, and the size of the ``vocabulary``.
llama.cpp's server gives the log-probabilities of as many tokens as it is asked for: of all, they are logits but for one
number.

    python foreign_llama.py JOB.json ANSWERS.safetensors
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ENDED", "main"]

ENDED = -1
"""Stands for tokens behind the end of a text, where llama.cpp stops."""

_TOKENS = 8  # that are written behind each prompt


def start_server(model: str, adapter: str | None, context: int) -> Any:
    """Start llama.cpp's server on the CPU, with an adapter or without."""
    xllamacpp: Any = import_module("xllamacpp")  # an extra
    parameters: Any = xllamacpp.CommonParams()
    parameters.model.path = model
    if adapter is not None:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    parameters.n_ctx = context
    parameters.n_gpu_layers = 0
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.verbosity = 0
    if threads := os.environ.get("OMP_NUM_THREADS", ""):
        # Its threads wait for each other by spinning, which takes for ever where other programs have the cores.
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = int(threads)
    return xllamacpp.Server(parameters)


def complete(server: Any, prompt: list[int], tokens: int, probabilities: int) -> list[dict[str, Any]]:
    """Return the tokens that follow a prompt greedily, each with its most probable rivals."""
    options = {"n_predict": tokens, "temperature": 0, "logprobs": 1, "n_probs": probabilities}
    reply: Any = server.handle_completions({"prompt": prompt, "cache_prompt": False, **options})
    reply = json.loads(reply) if isinstance(reply, str | bytes) else reply
    if "choices" not in reply:
        raise RuntimeError(f"llama.cpp refused a prompt: {str(reply)[:200]}")
    return reply["choices"][0]["logprobs"]["content"]


def answer(server: Any, prompts: list[list[int]], vocabulary: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return log-probabilities ``[prompts, vocabulary]`` behind each prompt, and tokens ``[prompts, 8]`` after it."""
    rows = np.full((len(prompts), vocabulary), -np.inf, dtype=np.float32)
    written = np.full((len(prompts), _TOKENS), ENDED)
    for index, prompt in enumerate(prompts):
        ids = [token["id"] for token in complete(server, prompt, _TOKENS, 1)]
        written[index, : len(ids)] = ids
        (first,) = complete(server, prompt, 1, vocabulary)
        for token in first["top_logprobs"]:
            rows[index, token["id"]] = token["logprob"]
    return rows, written


def main() -> None:
    """Load what the job names, answer, and write the answers."""
    from safetensors.numpy import save_file

    path, out = sys.argv[1:]
    with open(path, encoding="utf-8") as file:
        job = json.load(file)
    context = _TOKENS + max(len(prompt) for prompt in job["prompts"])
    answers: dict[str, NDArray[Any]] = {}
    for index, named in enumerate(job["models"]):
        server = start_server(named["model"], named["adapter"], context)
        logprobs, tokens = answer(server, job["prompts"], job["vocabulary"])
        answers |= {f"logits/{index}": logprobs, f"tokens/{index}": tokens}
        del server  # which stops it
    save_file(answers, out)


if __name__ == "__main__":
    main()
