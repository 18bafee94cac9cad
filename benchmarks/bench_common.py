"""What the benchmarks share: statistics, scores, peak memory, and the conditions of a run."""

from __future__ import annotations

import argparse
import ctypes.util
import gc
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kecore import Corpus, Editor, EditRecord, KeyStatistics
from kecore.cli.machine import environment
from kecore.errors import ArtifactError, StatisticsMismatchError
from kecore.evaluate import Evaluation

COLUMNS = {
    "ES": "edit_success",
    "PS": "paraphrase_success",
    "NS": "neighbourhood_success",
    "strict": "strict_accuracy",
}


def statistics_of(editor: Editor, text: Path, layers: Sequence[int], tokens: int | None, cache: Path) -> KeyStatistics:
    """Statistics from ``cache`` if they are of this model and cover the layers; else collected there."""
    try:
        found = KeyStatistics.load(cache)
        found.check(editor.view)
        if set(layers) <= set(found.layers):
            return found
    except (ArtifactError, StatisticsMismatchError):
        pass  # collected anew
    return KeyStatistics.collect(editor.view, editor.encoder, Corpus.of(text), layers, tokens=tokens, out=cache)


def warm_up(editor: Editor, records: Sequence[EditRecord], method: str, **config: Any) -> None:
    """Compile and load what only the first edit of a process has to; under another seed, so that no contexts stay."""
    editor.seed += 1
    editor.edit(records, method, **config)
    editor.revert()
    editor.seed -= 1


def scores(evaluation: Evaluation) -> dict[str, float]:
    """The scores that are compared."""
    found = evaluation.scores
    return {name: round(found[key].value, 4) for name, key in COLUMNS.items() if key in found}


def reset_peak() -> bool:
    """Let the peak of this process's memory begin anew from what is in use; false where the system offers no way."""
    gc.collect()
    if (library := ctypes.util.find_library("c")) and hasattr(ctypes.CDLL(library), "malloc_trim"):
        ctypes.CDLL(library).malloc_trim(0)  # what was freed would hide what is taken anew
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak() -> int:
    """Most bytes of main memory since :func:`reset_peak`."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def conditions(editor: Editor, options: argparse.Namespace) -> dict[str, Any]:
    """What the figures hold under."""
    statistics = editor.statistics
    return {
        **environment(editor.view.device),
        "model": options.model,
        "dtype": editor.base.dtype,
        "facts": options.facts.name,
        "statistics_tokens": statistics.tokens if statistics else None,
        "threads": options.threads,
    }
