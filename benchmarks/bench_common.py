"""What the benchmarks share: statistics, scores, peak memory, and the conditions of a run."""

from __future__ import annotations

import argparse
import gc
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kecore import Corpus, Editor, EditRecord, KeyStatistics, memory
from kecore.api.errors import ArtifactError, StatisticsMismatchError
from kecore.environment import environment
from kecore.evaluate import Evaluation
from kecore.files import cache_dir
from kecore.statistics import collect_statistics

COLUMNS = {
    "ES": "edit_success",
    "PS": "paraphrase_success",
    "NS": "neighbourhood_success",
    "strict": "strict_accuracy",
}

_MAIN = torch.device("cpu")


def statistics_of(editor: Editor, text: Path, layers: Sequence[int], tokens: int | None, cache: Path) -> KeyStatistics:
    """Statistics from ``cache`` if they are of this model and cover the layers; else collected there."""
    try:
        found = KeyStatistics.load(cache)
        found.check(editor.view)
        if set(layers) <= set(found.layers):
            return found
    except (ArtifactError, StatisticsMismatchError):
        pass  # collected anew
    return collect_statistics(editor.view, editor.encoder, Corpus.of(text), layers, tokens=tokens, out=cache)


def warm_up(editor: Editor, records: Sequence[EditRecord], method: str, **config: Any) -> None:
    """Compile and load what only the first edit of a process has to; under another seed, so that no contexts stay."""
    editor.seed += 1
    editor.edit(records, method, **config)
    editor.revert()
    editor.seed -= 1


def forget_contexts() -> None:
    """Drop the contexts that earlier sessions kept on disk, so that an edit's time includes writing them."""
    shutil.rmtree(cache_dir() / "contexts", ignore_errors=True)


def scores(evaluation: Evaluation) -> dict[str, float]:
    """The scores that are compared."""
    found = evaluation.scores
    return {name: round(found[key].value, 4) for name, key in COLUMNS.items() if key in found}


def reset_peak() -> bool:
    """Let the peak of this process's main memory begin anew from what is in use; false where there is no way."""
    gc.collect()
    return memory.reset_peak(_MAIN)


def peak() -> int:
    """Most bytes of main memory since :func:`reset_peak`; 0 where the system does not tell."""
    return memory.peak_bytes(_MAIN) or 0


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
