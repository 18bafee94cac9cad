"""Holds an exported adapter against the edit it was made of: loaded by peft alone, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kecore import foreign
from kecore.api.errors import ArtifactMismatchError, MissingDependencyError
from kecore.edit import WeightEdit
from kecore.models import LoadedModel, save_model
from kecore.text import Encoder

__all__ = ["Verification", "verify_adapter"]

_PROMPTS = 8
_NEAR = 1e-3  # share of the edit's own effect on the logits that a lossless adapter may differ by


@dataclass(frozen=True, slots=True)
class Verification:
    """How an adapter that another program loaded compares with the edit.

    Args:
        prompts: edited prompts that were asked.
        difference: the norm of the difference of the logits behind them, as a share of the edit's own effect.
        same_text: prompts behind which both write the same.
        changed_text: prompts behind which the edited model writes something else than the base.
    """

    prompts: int
    difference: float
    same_text: int
    changed_text: int

    @property
    def holds(self) -> bool:
        """Whether the adapter does what the edit does, and the edit does something."""
        return self.difference < _NEAR and self.same_text == self.prompts and self.changed_text > 0


def verify_adapter(loaded: LoadedModel, edits: Sequence[WeightEdit], adapter: str | Path) -> Verification:
    """Compare an adapter with edits on up to eight edited prompts, in float32 on the CPU.

    The unedited model is written to a temporary folder, and read there by transformers and peft in a fresh process that
    never imports kecore.

    Args:
        loaded: the unedited model; it is unedited again afterwards.
        edits: what the adapter was made of.
        adapter: the adapter's folder.

    Raises:
        MissingDependencyError: peft is not installed.
        ArtifactMismatchError: the edits were made for another model, or the foreign library cannot load the adapter.
    """
    from importlib.util import find_spec

    from safetensors.torch import load_file

    if find_spec("peft") is None:
        raise MissingDependencyError("an adapter is verified by loading it with peft: pip install 'kecore[lora]'")
    model: Any = loaded.model.to(device="cpu", dtype=torch.float32)  # type: ignore[arg-type]
    encoder = Encoder(loaded.tokenizer)
    texts = dict.fromkeys(request.text for edit in edits for request in edit.requests)
    prompts = [list(encoder.encode(text).ids) for text in list(texts)[:_PROMPTS]]
    base_logits, base_tokens = foreign.answer(model, prompts)
    with TemporaryDirectory() as folder:
        base = save_model(model, loaded.tokenizer, Path(folder) / "base")
        for edit in edits:
            edit.attach(model)
        edited_logits, edited_tokens = foreign.answer(model, prompts)
        for edit in reversed(edits):
            edit.revert(model)
        (Path(folder) / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
        answers = Path(folder) / "answers.safetensors"
        words = [sys.executable, foreign.__file__, base, adapter, Path(folder) / "prompts.json", answers]
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = done.stderr.strip().rpartition("\n")[2]
            raise ArtifactMismatchError(f"{adapter}: transformers and peft cannot load it ({reason})")
        served = load_file(answers)
    effect = float((edited_logits - base_logits).norm())
    difference = float((served["logits"] - edited_logits).norm())
    return Verification(
        prompts=len(prompts),
        difference=difference / effect if effect else float("inf"),
        same_text=int((served["tokens"] == edited_tokens).all(1).sum()),
        changed_text=int((base_tokens != edited_tokens).any(1).sum()),
    )
