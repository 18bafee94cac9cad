"""The editing path of gpu_check.py: a Llama of 8 billion random weights, built on the device, edited end to end."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

LAYERS = (4, 5, 6, 7, 8)
DEADLINE = 110.0  # seconds after which no further edit is begun


def llama(device: torch.device, small: bool) -> Any:
    """A model of Llama-3-8B's shape, random weights in bfloat16 (float32 where it is small)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512 if small else 128256,
        hidden_size=32 if small else 4096,
        intermediate_size=48 if small else 14336,
        num_hidden_layers=10 if small else 32,
        num_attention_heads=4 if small else 32,
        num_key_value_heads=2 if small else 8,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if small else torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def text(folder: Path) -> Path:
    """A passage a line, from the sample that comes with the package."""
    from kecore import data

    source = Path(data.__file__).parent / "wikipedia_sample.jsonl.gz"
    passages = [
        json.loads(line)["text"].replace("\n", " ") for line in gzip.decompress(source.read_bytes()).splitlines()
    ]
    path = folder / "text.txt"
    path.write_text("\n".join(passages))
    return path


def facts(count: int) -> list[Any]:
    """Made-up requests, each with a subject of its own."""
    from kecore import EditRequest

    cities = ("Paris", "Rome", "Cairo", "Lima", "Oslo")
    return [EditRequest("{} is in the city of", cities[i % len(cities)], f"Tower number {i}") for i in range(count)]


def timed(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def floor_seconds(tokens: int, layers: int, d: int, parameters: int) -> float:
    """Least time for the statistics at 700 bf16 TFLOP/s: the forward pass to the last layer, and the triangles."""
    return tokens * (2 * parameters + layers * d * (d + 1)) / 700e12


def editing(device: torch.device, small: bool) -> list[dict[str, Any]]:
    """Statistics of five layers, then MEMIT and AlphaEdit; an edit that fails is a row, and the others still run."""
    from kecore import Corpus, Editor
    from kecore.api.errors import KecoreError
    from kecore.statistics import collect_statistics
    from kecore.testing.models import tiny_tokenizer
    from kecore_methods.locate.alphaedit import AlphaEdit
    from kecore_methods.locate.memit import Memit

    begin = timed(device)
    editor = Editor(llama(device, small), tiny_tokenizer())
    rows: list[dict[str, Any]] = [{"step": "build", "seconds": timed(device) - begin}]
    tokens = 600 if small else 32768
    with TemporaryDirectory() as folder:
        start = timed(device)
        editor.statistics = collect_statistics(
            editor.view, editor.encoder, Corpus.of(text(Path(folder))), LAYERS, tokens=tokens
        )
        spent = timed(device) - start
    below = sum(p.numel() for layer in editor.model.model.layers[: LAYERS[-1] + 1] for p in layer.parameters())
    least = floor_seconds(tokens, len(LAYERS), editor.model.config.intermediate_size, below)
    row: dict[str, Any] = {"step": "statistics", "tokens": tokens, "seconds": spent}
    rows.append(row | {"tokens_per_s": tokens / spent, "floor_s": least})
    counts = (2, 3) if small else (10, 100, 1000)
    made: dict[tuple[Any, int, bool], Any] = {}
    plain = [(method, count, False) for method in (Memit, AlphaEdit) for count in counts]
    replayed = [(Memit, count, graphs) for count in (1, counts[0]) for graphs in (False, True)]
    for method, count, graphs in plain[:1] + replayed + plain[1:]:  # the first warms up
        about: dict[str, Any] = {"step": method.name, "facts": count, "graphs": graphs}
        if timed(device) - begin > DEADLINE:
            rows.append(about | {"skipped": "out of time"})
            continue
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = timed(device)
        try:
            edit = editor.edit(facts(count), method, layers=LAYERS, graphs=graphs)
        except KecoreError as error:
            rows.append(about | {"failed": f"{type(error).__name__}: {error}"})
            continue
        spent = timed(device) - start
        row = about | {"seconds": spent, "facts_per_s": count / spent}
        row |= {f"{stage}_s": took for stage, took in editor.history[-1].stages.items()}
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
        made[method, count, graphs] = edit
        if graphs and (method, count, False) in made:
            row["difference"] = apart(made[method, count, False], edit)
        rows.append(row)
        editor.revert()
    return rows


def apart(plain: Any, other: Any) -> float:
    """Largest relative difference of two edits' changes of a matrix."""
    pairs = [(update.matrix(), other.updates[name].matrix()) for name, update in plain.updates.items()]
    return max(float((a - b).norm() / a.norm()) for a, b in pairs)
