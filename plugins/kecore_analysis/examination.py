"""Examinations of a model before and after an edit: their questions, their conditions, and the differences.

:mod:`kecore_analysis.health` defines the figures; here they are taken together. ``kecore checkup`` is the command.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from kecore import data
from kecore.api.errors import ConfigError, DataFormatError
from kecore.api.progress import Progress, silent
from kecore.corpus import Corpus
from kecore.evaluate.cost import Latency, added_latency, edit_bytes
from kecore.evaluate.protocol import METRIC_VERSION
from kecore.evaluate.sources import open_source
from kecore.inference.scoring import BATCH_TOKENS
from kecore_analysis.harness import check_tasks
from kecore_analysis.health import Change, Checkup, MatrixHealth, changes, checkup, weight_health
from kecore_analysis.tasks import TaskSet, load_task, spread, task_files

if TYPE_CHECKING:
    from kecore.api.identity import Identity
    from kecore.edit import Edit
    from kecore.model import ModelView
    from kecore.text import Encoder

__all__ = ["PARTS", "Examination", "SideEffects", "examine"]

PARTS = ("perplexity", "drift", "matrices", "latency")
"""What every examination holds unless it is left out by name."""

SAMPLE = "wikipedia_sample.jsonl.gz"
"""The bundled text that stands in where no held-out text is given."""

WORDS = 12
"""Words at the beginning of a passage that make a prompt."""

_WORD_CHARACTERS = 12

TIMED, TIMED_TOKENS = 4, 16
"""Prompts that are timed, and tokens that are written after each."""


@dataclass(frozen=True)
class Examination:
    """The questions that are put to the unedited and to the edited model.

    Args:
        passages: held-out text, for perplexity.
        prompts: unrelated prompts, for drift.
        tasks: small task sets.
        harness: names of tasks of the Language Model Evaluation Harness.
        harness_limit: documents of each of these; None for all.
        harness_folder: folder with further tasks of the harness.
        timed: prompts that are timed, for latency.
        matrices: take norms and spectra of the edited matrices.
        window: most tokens of a passage.
        sources: where all this comes from, as JSON values.
    """

    passages: Sequence[str] = ()
    prompts: Sequence[str] = ()
    tasks: Sequence[TaskSet] = ()
    harness: Sequence[str] = ()
    harness_limit: int | None = None
    harness_folder: str | None = None
    timed: Sequence[str] = ()
    matrices: bool = True
    window: int = 256
    sources: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        *,
        text: Sequence[str | Path] = (),
        prompts: str | Path | None = None,
        tasks: Sequence[str | Path] = (),
        harness: Sequence[str] = (),
        harness_folder: str | Path | None = None,
        without: Sequence[str] = (),
        limit: int = 100,
        window: int = 256,
        seed: int = 0,
    ) -> Examination:
        """Read an examination from files.

        Args:
            text: held-out text, as :meth:`kecore.corpus.Corpus.of` takes it; by default the sample that kecore ships.
            prompts: a file with one unrelated prompt a line, plain or gzipped; by default the first words of passages.
            tasks: task sets, as :func:`~kecore_analysis.tasks.task_files` takes them.
            harness: names of harness tasks.
            harness_folder: folder with further tasks of the harness.
            without: names among :data:`PARTS` to leave out.
            limit: most passages, prompts, items of each task and documents of each harness task.
            window: most tokens of a passage.
            seed: chooses the passages; items are spread evenly over their files.

        Raises:
            ConfigError: an unknown part or task, a task twice, nothing to ask, or a number below 1.
            DataFormatError: a file is missing, empty or broken.
            MissingDependencyError: harness tasks are asked for and lm-eval is not installed.
            HubError: their data cannot be fetched.
        """
        unknown = sorted(set(without) - set(PARTS))
        if unknown:
            raise ConfigError(f"no part '{unknown[0]}' to leave out; known: {', '.join(PARTS)}")
        if limit < 1:
            raise ConfigError(f"limit must be at least 1, got {limit}")
        files = _files_by_task(tasks)
        check_tasks(harness, harness_folder)
        held_out = Corpus.of(*(text or (data.path(SAMPLE),))).sample(limit, seed)
        passages = list(held_out.passages)
        if prompts is not None:
            unrelated = _lines(Path(prompts), limit)
        else:
            unrelated = [_beginning(passage) for passage in passages]
        task_sets = [load_task(name, file, limit=limit) for name, file in files.items()]
        folder = None if harness_folder is None else str(harness_folder)
        examination = cls(
            passages=() if "perplexity" in without else passages,
            prompts=() if "drift" in without else unrelated,
            tasks=task_sets,
            harness=harness,
            harness_limit=limit if harness else None,
            harness_folder=folder,
            timed=() if "latency" in without else unrelated[:TIMED],
            matrices="matrices" not in without,
            window=window,
            sources={
                "text": {"files": [str(source) for source in text] or [SAMPLE], "sha256": held_out.digest},
                "prompts": None if prompts is None else str(prompts),
                "tasks": {name: str(file) for name, file in files.items()},
                "harness_folder": folder,
                "limit": limit,
                "seed": seed,
            },
        )
        examination._check_not_empty()
        return examination

    def _check_not_empty(self) -> None:
        measured = (self.passages, self.prompts, self.tasks, self.harness, self.timed, self.matrices)
        if not any(measured):
            raise ConfigError("everything was left out; an examination needs at least one part")

    def take(
        self, view: ModelView, encoder: Encoder, *, batch_tokens: int = BATCH_TOKENS, progress: Progress = silent
    ) -> Checkup:
        """Examine a model as it is now; see :func:`~kecore_analysis.health.checkup`."""
        return checkup(
            view,
            encoder,
            passages=self.passages,
            tasks=self.tasks,
            prompts=self.prompts,
            harness=self.harness,
            harness_limit=self.harness_limit,
            harness_folder=self.harness_folder,
            window=self.window,
            batch_tokens=batch_tokens,
            progress=progress,
        )

    def conditions(self, encoder: Encoder) -> dict[str, Any]:
        """Return what decides every figure but the model, its edits and the machine, as JSON values.

        Its ``hash``, twelve hex digits, is equal where the same was asked in the same way: figures of two models or
        edits belong into one table only then.
        """
        values: dict[str, Any] = {
            "form": "chat" if encoder.chat else "plain",
            "metrics": METRIC_VERSION,
            "perplexity": None,
            "drift": None,
            "tasks": {task.name: _conditions(task) for task in self.tasks},
            "harness": None,
            "latency": None,
        }
        if self.passages:
            values["perplexity"] = {
                "passages": len(self.passages),
                "window": self.window,
                "sha256": _digest(self.passages),
            }
        if self.prompts:
            values["drift"] = {"prompts": len(self.prompts), "sha256": _digest(self.prompts)}
        if self.harness:
            values["harness"] = {
                "tasks": [*self.harness],
                "limit": self.harness_limit,
                "lm_eval": version("lm_eval"),
            }
        if self.timed:
            values["latency"] = {"prompts": len(self.timed), "tokens": TIMED_TOKENS}
        return {**values, "hash": _digest([json.dumps(values, sort_keys=True)])[:12]}


@dataclass(frozen=True)
class SideEffects:
    """Effects of edits beside their facts.

    Args:
        edits: what was on the model: method, seed, configuration, number of facts, bytes.
        changes: each figure before and after; see :func:`~kecore_analysis.health.changes`.
        f1: weighted F1 before and after of each task whose answers are chosen.
        matrices: the edited matrices.
        latency: of a generated token; None where it was not timed.
    """

    edits: tuple[Mapping[str, Any], ...]
    changes: Mapping[str, Change]
    f1: Mapping[str, tuple[float, float]]
    matrices: tuple[MatrixHealth, ...]
    latency: Latency | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "edits": [dict(edit) for edit in self.edits],
            "changes": {name: change.to_json() for name, change in self.changes.items()},
            "f1": {name: list(pair) for name, pair in self.f1.items()},
            "matrices": [matrix.to_json() for matrix in self.matrices],
            "latency": None if self.latency is None else self.latency.to_json(),
        }


def examine(
    view: ModelView,
    encoder: Encoder,
    edits: Sequence[Edit],
    before: Checkup,
    examination: Examination,
    *,
    base: Identity | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
) -> SideEffects:
    """Put edits on a model, examine it, and take them off again.

    Args:
        view: the model, as it was when ``before`` was taken.
        encoder: its tokenizer.
        edits: all of them together are examined.
        before: what ``examination`` gave without them.
        examination: what is asked.
        base: identity of the unedited model, if it is at hand.
        batch_tokens: padded tokens of one micro-batch: speed and memory, not the result.
        progress: called after each micro-batch.

    Raises:
        ConfigError: no edits.
        ArtifactMismatchError: an edit was made for another model.
    """
    if not edits:
        raise ConfigError("no edits to examine; give at least one")
    with ExitStack() as attached:
        for edit in edits:
            edit.attach(view.model, base=base)
            attached.callback(edit.revert, view.model)
        after = examination.take(view, encoder, batch_tokens=batch_tokens, progress=progress)
        timed = examination.timed
        return SideEffects(
            edits=tuple(_describe(edit) for edit in edits),
            changes=changes(before, after),
            f1=_f1_before_and_after(before, after),
            matrices=tuple(weight_health(view.model, progress)) if examination.matrices else (),
            latency=added_latency(view, encoder, timed, tokens=TIMED_TOKENS) if timed else None,
        )


def _f1_before_and_after(before: Checkup, after: Checkup) -> dict[str, tuple[float, float]]:
    """Return F1 of each task whose answers are chosen."""
    pairs: dict[str, tuple[float, float]] = {}
    for name, task in after.tasks.items():
        old, new = before.tasks[name].f1, task.f1
        if old is not None and new is not None:
            pairs[name] = (old, new)
    return pairs


def _describe(edit: Edit) -> dict[str, Any]:
    """Return what the side effects of an edit may depend on."""
    header = edit.inspect()
    values = {name: header[name] for name in ("method", "version", "seed", "config", "base")}
    return {**values, "facts": len(edit.requests), "bytes": edit_bytes(edit)}


def _files_by_task(sources: Sequence[str | Path]) -> dict[str, Path]:
    """Find the files of task sets.

    Raises:
        ConfigError: an unknown task, or a task twice.
    """
    files: dict[str, Path] = {}
    for source in sources:
        for name, file in task_files(source).items():
            if name in files:
                raise ConfigError(f"the task '{name}' is given twice, by {files[name]} and {file}")
            files[name] = file
    return files


def _conditions(task: TaskSet) -> dict[str, Any]:
    """Return what decides the figures of a task set, and what guessing gives."""
    chances = [1 / len(item.choices) for item in task.items if item.choices]
    chance = fmean(chances) if chances else None
    return {"items": len(task.items), "chance": chance, "sha256": _digest([repr(item) for item in task.items])}


def _digest(texts: Sequence[str]) -> str:
    """Return the SHA-256 of texts in any order, which changes no figure."""
    return sha256(json.dumps(sorted(texts), ensure_ascii=False).encode()).hexdigest()


def _beginning(passage: str) -> str:
    """Return the first words of a passage; of a script without spaces as many characters as they might have."""
    words = passage.split()
    return " ".join(words[:WORDS])[: _WORD_CHARACTERS * WORDS]


def _lines(path: Path, limit: int) -> list[str]:
    """Return prompts of a file, one a line, each once."""
    lines: list[str] = []
    for document in open_source(path, None):
        lines += (document.text or "").splitlines()
    stripped = [line.strip() for line in lines]
    prompts = list(dict.fromkeys(line for line in stripped if line))
    if not prompts:
        raise DataFormatError(f"{path} holds no prompts; expected one a line")
    return spread(prompts, limit)
