"""Holds an export against the edit it was made of: loaded by another program alone, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from kecore import foreign, foreign_llama
from kecore.api.errors import ArtifactError, ArtifactMismatchError, MissingDependencyError
from kecore.edit import WeightEdit
from kecore.evaluate import Protocol, evaluate
from kecore.facts import as_records
from kecore.model import ModelView
from kecore.models import LoadedModel, save_model
from kecore.serving.adapter import reduced
from kecore.serving.targets import MODEL, Export
from kecore.text import Encoder

__all__ = ["ScoreDrop", "Verification", "need_program", "program_of", "score_drop", "verify_export"]

_PROMPTS = 8
_NEAR = {"peft": 1e-3, "transformers": 1e-3, "llama.cpp": 0.2}
"""Share of the edit's own effect on the logits that a lossless export may differ by. llama.cpp computes in few bits."""

_PACKAGES = {
    "peft": ("peft", "pip install 'kecore[lora]'"),
    "transformers": ("transformers", "pip install transformers"),
    "llama.cpp": ("xllamacpp", "pip install 'kecore[llama]'"),
}
"""Package that each program is loaded by, and how to get it."""


@dataclass(frozen=True, slots=True)
class Verification:
    """How an export that another program loaded compares with the edit.

    Args:
        program: ``peft``, ``transformers`` or ``llama.cpp``.
        prompts: edited prompts that were asked.
        difference: the norm of the difference of the logits behind them, as a share of the edit's own effect. Of
            llama.cpp, which computes in other precision, what the edit changes is compared, base against base.
        same_text: prompts behind which both write the same.
        changed_text: prompts behind which the program writes something else than the base.
        said_target: prompts behind which the program writes the target, as far as eight tokens go.
    """

    program: str
    prompts: int
    difference: float
    same_text: int
    changed_text: int
    said_target: int

    @property
    def holds(self) -> bool:
        """Whether the export does what the edit does, and the edit does something."""
        near = self.difference < _NEAR[self.program] and self.changed_text > 0
        return near and (self.program == "llama.cpp" or self.same_text == self.prompts)


@dataclass(frozen=True, slots=True)
class _Answers:
    """What a model says behind some prompts.

    Args:
        logits: ``[prompts, vocab]`` float32.
        tokens: ``[prompts, written]``.
    """

    logits: Tensor
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class _Served:
    """What a program is given.

    Args:
        model: a folder or a file.
        adapter: the same of an adapter on it.
    """

    model: Path
    adapter: Path | None = None

    def __str__(self) -> str:
        return str(self.adapter or self.model)

    def to_json(self) -> dict[str, str | None]:
        """Return the paths as a job names them."""
        return {"model": str(self.model), "adapter": None if self.adapter is None else str(self.adapter)}


def verify_export(loaded: LoadedModel, edits: Sequence[WeightEdit], export: Export) -> Verification:
    """Compare an export with its edits on up to eight edited prompts, on the CPU.

    Adapters are compared in float32, a checkpoint in its own type, GGUF files by llama.cpp as it serves them.

    Args:
        loaded: the unedited model; it is unedited again afterwards.
        edits: what the export was made of.
        export: what was written.

    Raises:
        MissingDependencyError: the program is not installed.
        ArtifactError: there is no GGUF file of the base model, or the edits have no prompts.
        ArtifactMismatchError: the edits were made for another model, or the program cannot load the export.
    """
    program = program_of(export.target)
    need_program(program)
    model: Any = loaded.model
    model.to(device="cpu", dtype=None if export.target == "merged" else torch.float32)
    encoder = Encoder(loaded.tokenizer)
    targets = {request.text: request.target for edit in edits for request in edit.requests}  # the last one of a prompt
    if not targets:
        raise ArtifactError("the edit holds no requests, so there is no prompt to verify it on")
    prompts = [list(encoder.encode(text).ids) for text in list(targets)[:_PROMPTS]]
    base = _Answers(*foreign.answer(model, prompts))
    for edit in edits:
        edit.attach(model)
    try:
        edited = _Answers(*foreign.answer(model, prompts))
    finally:
        for edit in reversed(edits):
            edit.revert(model)
    if program == "llama.cpp":
        found = _ask_llama_cpp(export, prompts, base, edited)
    else:
        found = _ask_transformers(loaded, export, prompts, base, edited)
    tokens = found.served.tokens
    same_tokens = (tokens == edited.tokens) | (tokens == foreign_llama.ENDED)  # [prompts, written]
    effect = float((edited.logits - base.logits).norm())
    return Verification(
        program=program,
        prompts=len(prompts),
        difference=float(found.error.norm()) / effect if effect else float("inf"),
        same_text=int(same_tokens.all(1).sum()),
        changed_text=int((tokens != found.base_tokens).any(1).sum()),
        said_target=_count_said(loaded.tokenizer, tokens, list(targets.values())),
    )


@dataclass(frozen=True, slots=True)
class _Comparison:
    """What a program says of an export.

    Args:
        served: its answers.
        base_tokens: what the same program writes without the edit, ``[prompts, written]``.
        error: how its logits are others than the edit's, ``[prompts, vocab]``.
    """

    served: _Answers
    base_tokens: Tensor
    error: Tensor


def _count_said(tokenizer: Any, tokens: Tensor, targets: Sequence[str]) -> int:
    """Count rows ``[prompts, written]`` that begin with the target of their prompt, as far as they go."""
    said = 0
    for row, target in zip(tokens.tolist(), targets, strict=False):  # more targets than prompts were asked
        written = [token for token in row if token != foreign_llama.ENDED]
        text = tokenizer.decode(written, skip_special_tokens=True).strip()
        if text and (text.startswith(target.strip()) or target.strip().startswith(text)):
            said += 1
    return said


def _ask_transformers(
    loaded: LoadedModel, export: Export, prompts: list[list[int]], base: _Answers, edited: _Answers
) -> _Comparison:
    """Let transformers answer with a checkpoint, or peft with an adapter."""
    program = program_of(export.target)
    with TemporaryDirectory() as folder:
        served_model = _Served(export.folder)
        if program == "peft":
            base_folder = Path(loaded.source)
            if not base_folder.is_dir():
                base_folder = save_model(loaded.model, loaded.tokenizer, Path(folder) / "base")
            served_model = _Served(base_folder, export.folder)
        (served,) = _ask(program, [served_model], prompts, edited.logits.shape[1])
    return _Comparison(served, base.tokens, served.logits - edited.logits)


def program_of(target: str) -> str:
    """Return the program that loads what is exported to a target."""
    return {"peft": "peft", "merged": "transformers"}.get(target, "llama.cpp")


def need_program(program: str) -> None:
    """Refuse to verify by a program that is not there.

    Raises:
        MissingDependencyError: says how to get it.
    """
    package, install = _PACKAGES[program]
    if find_spec(package) is None:
        raise MissingDependencyError(
            f"the export is verified by loading it with {package}, which is missing: {install}"
        )


def _ask_llama_cpp(export: Export, prompts: list[list[int]], base: _Answers, edited: _Answers) -> _Comparison:
    """Let llama.cpp answer with a model or an adapter, and with the base."""
    if export.base_gguf is None:
        raise ArtifactError("llama.cpp needs the base model as a GGUF file to compare with: give --base-gguf FILE")
    if export.is_gguf_adapter:
        adapter = next(export.folder / name for name in export.files if name.endswith(".gguf"))
        edited_file = _Served(export.base_gguf, adapter)
    else:
        edited_file = _Served(export.folder / MODEL)
    models = [_Served(export.base_gguf), edited_file]
    served_base, served = _ask("llama.cpp", models, prompts, edited.logits.shape[1])
    # The server gives log-probabilities. Both programs' are compared by what the edit changes in them.
    change = edited.logits.log_softmax(-1) - base.logits.log_softmax(-1)  # [prompts, vocab]
    served_change = served.logits - served_base.logits
    return _Comparison(served, served_base.tokens, served_change - change)


def _ask(program: str, models: Sequence[_Served], prompts: list[list[int]], vocabulary: int) -> list[_Answers]:
    """Let a program answer with models, in a process of its own.

    Raises:
        ArtifactMismatchError: it cannot load what it is given.
    """
    from safetensors.torch import load_file

    script = foreign_llama if program == "llama.cpp" else foreign
    with TemporaryDirectory() as folder:
        job, answers = Path(folder) / "job.json", Path(folder) / "answers.safetensors"
        values = {"models": [model.to_json() for model in models], "prompts": prompts, "vocabulary": vocabulary}
        job.write_text(json.dumps(values), encoding="utf-8")
        words = [sys.executable, script.__file__, str(job), str(answers)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = done.stderr.strip().rpartition("\n")[2]
            raise ArtifactMismatchError(f"{program} cannot load {models[-1]} ({reason})")
        tensors = load_file(answers)
    return [_Answers(tensors[f"logits/{i}"], tensors[f"tokens/{i}"]) for i in range(len(models))]


@dataclass(frozen=True, slots=True)
class ScoreDrop:
    """What a lower rank costs.

    Args:
        before: scores of the edit as it is, on its own requests, by metric.
        after: those of what the rank holds.
    """

    before: dict[str, float]
    after: dict[str, float]


def score_drop(loaded: LoadedModel, edit: WeightEdit, rank: int) -> ScoreDrop:
    """Score an edit and what a lower rank holds of it on the edit's own requests.

    Args:
        loaded: the unedited model; it is unedited again afterwards.
        edit: the edit.
        rank: columns of the adapter.
    """
    view = ModelView.of(loaded.model)
    encoder = Encoder(loaded.tokenizer, max_length=view.max_length, handover=view.handover_ids)
    records = as_records(edit.requests)
    scores: list[dict[str, float]] = []
    for candidate in (edit, reduced(edit, rank)):
        candidate.attach(loaded.model)
        try:
            evaluation = evaluate(view, encoder, records, Protocol())
        finally:
            candidate.revert(loaded.model)
        scores.append({name: score.value for name, score in evaluation.scores.items()})
    return ScoreDrop(*scores)
