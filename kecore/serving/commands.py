"""What serves an exported edit: the commands of the programs of the field, and what they are known to ignore."""

from __future__ import annotations

import re
from pathlib import Path
from shlex import quote

from kecore.edit import WeightEdit
from kecore.serving.adapter import served_rank

__all__ = ["adapter_commands", "checkpoint_commands", "find_ignored", "gguf_commands", "ollama_commands"]


def adapter_commands(folder: Path, base: str, rank: int) -> list[str]:
    """Return what starts servers with an adapter of PEFT's format.

    Args:
        folder: the adapter.
        base: the base model as the servers find it; empty where it is not known.
        rank: the adapter's rank.
    """
    adapter, model, served = quote(str(folder)), quote(base or "BASE"), served_rank(rank)
    commands: list[str] = []
    if served is not None:
        commands.append(f"vllm serve {model} --enable-lora --max-lora-rank {served} --lora-modules edited={adapter}")
    commands.append(
        f"python -m sglang.launch_server --model-path {model} --enable-lora --max-lora-rank {rank} "
        f"--lora-paths edited={adapter}"
    )
    return commands


def checkpoint_commands(folder: Path) -> list[str]:
    """Return what starts servers with a checkpoint."""
    name = quote(str(folder))
    return [f"vllm serve {name}", f"python -m sglang.launch_server --model-path {name}"]


def gguf_commands(file: Path, base: Path | None = None, *, is_adapter: bool) -> list[str]:
    """Return what starts llama.cpp with a model, or with an adapter beside its base."""
    if not is_adapter:
        return [f"llama-server -m {quote(str(file))}"]
    return [f"llama-server -m {quote(str(base or 'BASE.gguf'))} --lora {quote(str(file))}"]


def ollama_commands(folder: Path) -> list[str]:
    """Return what makes a model of a Modelfile known to Ollama, and runs it."""
    name = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-") or "edited"
    return [f"ollama create {name} -f {quote(str(folder / 'Modelfile'))}", f"ollama run {name}"]


def find_ignored(edit: WeightEdit, rank: int) -> list[str]:
    """Return warnings of what servers refuse or pass over in silence when they are given the edit as an adapter."""
    warnings: list[str] = []
    if served_rank(rank) is None:
        warnings.append(
            f"vLLM takes adapters of rank 512 at the most, and this one has {rank}: give --rank N, or --to merged"
        )
    for name in edit.updates:
        reason = _reason_to_ignore(name, name in edit.transposed)
        if reason is not None:
            warnings.append(
                f"{name} {reason}: servers may refuse the adapter, or answer as the base does without a word; "
                "--to merged is served by all of them"
            )
            break  # one of a kind says enough
    return warnings


def _reason_to_ignore(name: str, transposed: bool) -> str | None:
    """Return why a server may pass over an adapter for a parameter; None where all of them take it."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    if transposed:
        return "is stored transposed, as GPT-2's are, and not in a linear module"
    if not numbers:
        return "stands outside of the layers"
    if len(numbers) > 1:
        return "is of one expert of several, which servers keep as one tensor"
    return None
