"""The guard: what a model's edits may cost at the most, looked at after every batch.

It reads held-out text, asks the user's own canaries, and takes norm and spectrum of what all edits changed; each figure
is relative to the unedited model's. Where one is beyond its limit, the batch stays, is taken off, or is written by
another method that leaves the weights alone, as the :class:`Policy` says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from kecore.api.config import validate_config
from kecore.api.errors import ConfigError, DataFormatError, EditStateError
from kecore.edit import WeightEdit, attached, factors_of, unedited
from kecore.evaluate.held_out import Drift, HeldOutText, drift
from kecore.inference.generation import generate
from kecore.inference.scoring import score_continuations
from kecore.model import MatrixName

if TYPE_CHECKING:
    from torch import Tensor

    from kecore.edit import Edit
    from kecore.editor import Editor
    from kecore.facts import Facts

__all__ = ["Breach", "Canary", "Guard", "GuardReport", "GuardedEdit", "MatrixChange", "Policy", "load_canaries"]

_CANARY_TOKENS = 8
"""Tokens of the unedited model's own answer, where a canary has none of its user's."""


class Policy(BaseModel):
    """Limits of a guard, and what it does where one is passed; None for no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    perplexity_ratio: float | None = Field(
        default=1.05, gt=0, description="largest perplexity of held-out text, times the unedited model's"
    )
    agreement: float | None = Field(
        default=0.9, ge=0, le=1, description="least share of tokens after which both would write the same next one"
    )
    canaries: float | None = Field(default=1.0, ge=0, le=1, description="least share of canaries answered as before")
    change: float | None = Field(
        default=0.3, gt=0, description="largest Frobenius norm of a matrix's accumulated update, times the matrix's"
    )
    spectral: float | None = Field(
        default=1.0, gt=0, description="largest singular value of that update, times the matrix's largest"
    )
    on_breach: Literal["report", "stop", "roll-back", "hand-over"] = Field(
        default="roll-back",
        description="report: the batch stays; stop: it stays, and no further one is written; roll-back: it is taken "
        "off; hand-over: it is taken off and written by the method 'memory'",
    )
    memory: str = Field(default="grace", description="method that facts are handed over to")

    @classmethod
    def make(cls, values: Mapping[str, Any]) -> Policy:
        """Validate ``values``.

        Raises:
            ConfigError: names each bad key, what was expected and what came.
        """
        return validate_config(cls, values)


@dataclass(frozen=True, slots=True)
class Canary:
    """A prompt whose answer no edit may change.

    Args:
        prompt: the prompt.
        answer: what it has to be answered by; empty for what the unedited model writes.
    """

    prompt: str
    answer: str = ""


def load_canaries(path: str | Path) -> list[Canary]:
    """Read canaries: ``.jsonl`` with ``prompt`` and, if any, ``answer``, or a text with one prompt a line.

    Raises:
        DataFormatError: it cannot be read, holds none, or a line is no canary; names the line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataFormatError(f"{path}: canaries cannot be read ({error})") from None
    canaries: list[Canary] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            canaries.append(_read_canary(line, path, number) if path.suffix == ".jsonl" else Canary(line.strip()))
    if not canaries:
        raise DataFormatError(f"{path}: holds no canaries; write one prompt a line")
    return canaries


def _read_canary(line: str, path: Path, number: int) -> Canary:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise DataFormatError(f"{path}:{number}: not JSON ({error})") from None
    fields = values if isinstance(values, dict) else {}
    prompt, answer = fields.get("prompt"), fields.get("answer", "")
    if not isinstance(prompt, str) or not prompt or not isinstance(answer, str):
        raise DataFormatError(f'{path}:{number}: expected {{"prompt": ..., "answer": ...}} with texts, got {line!r}')
    return Canary(prompt, answer)


@dataclass(frozen=True, slots=True)
class MatrixChange:
    """What all edits together changed of a matrix.

    Args:
        name: the parameter.
        change: Frobenius norm of the update, times the unedited matrix's.
        spectral: largest singular value of the update, times the unedited matrix's largest.
        stable_rank: squared Frobenius norm of the update over its squared largest singular value.
    """

    name: str
    change: float
    spectral: float
    stable_rank: float


@dataclass(frozen=True, slots=True)
class Breach:
    """A limit that was passed.

    Args:
        limit: its name in the :class:`Policy`.
        value: the figure.
        allowed: the limit.
        where: the matrix or the canaries that it is about; empty where it is about the model.
    """

    limit: str
    value: float
    allowed: float
    where: str = ""

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        return f"{self.limit} {self.value:.3f}, allowed {self.allowed:.3f}{place}"


@dataclass(frozen=True, slots=True)
class GuardReport:
    """What a guard saw.

    Args:
        drift: held-out text; None where the guard has none.
        failed_canaries: prompts that are answered otherwise than before.
        canaries: number of canaries.
        matrices: what the edits changed, a matrix each.
        breaches: limits that were passed.
    """

    drift: Drift | None
    failed_canaries: Sequence[str]
    canaries: int
    matrices: Sequence[MatrixChange]
    breaches: Sequence[Breach]


@dataclass(frozen=True, slots=True)
class GuardedEdit:
    """A batch that went through a guard.

    Args:
        edit: what is on the model; None where it was taken off.
        report: what the guard saw with the batch on the model.
        handed_over: the edit is of the method that facts are handed over to.
    """

    edit: Edit | None
    report: GuardReport
    handed_over: bool = False


@dataclass
class Guard:
    """Watches over a session's edits; made while it has none, since all is compared with the unedited model.

    Args:
        editor: the session.
        policy: limits, and what is done where one is passed.
        passages: held-out text; none to leave it out.
        canaries: prompts whose answers have to stay.
        window: most tokens of a passage.

    Raises:
        EditStateError: the session has edits already.
        ConfigError: there is neither text nor a canary nor a limit of the weights to watch.
    """

    editor: Editor
    policy: Policy = field(default_factory=Policy)
    passages: Sequence[str] = ()
    canaries: Sequence[Canary] = ()
    window: int = 128
    reports: list[GuardReport] = field(default_factory=list[GuardReport], init=False)
    stopped: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        editor, policy = self.editor, self.policy
        if attached(editor.model):
            raise EditStateError("a guard compares with the unedited model; revert the session's edits, then make it")
        if not self.passages and not self.canaries and policy.change is None and policy.spectral is None:
            raise ConfigError("the guard has nothing to watch: give it passages, canaries, or a limit of the weights")
        self._text: HeldOutText | None = None
        if self.passages:
            self._text = HeldOutText.of(editor.encoder, self.passages, self.window)
            self._base = self._text.read(editor.view, editor.encoder)
        self._expected = self._expected_answers()
        self._sizes: dict[str, tuple[float, float]] = {}  # of an unedited matrix: Frobenius norm, singular value

    def edit(self, facts: Facts, method: str = "memit", **config: Any) -> GuardedEdit:
        """Edit facts, look at the model, and do what the policy says.

        Args:
            facts: the batch.
            method: a method or a line of stages.
            config: fields of its configuration.

        Raises:
            EditStateError: an earlier batch stopped the guard.
            KecoreError: as :meth:`Editor.edit`.
        """
        if self.stopped:
            breaches = "; ".join(map(str, self.reports[-1].breaches))
            raise EditStateError(f"the guard has stopped ({breaches}); revert edits, or call resume() to go on")
        edit = self.editor.edit(facts, method, **config)
        report = self.check()
        if not report.breaches or self.policy.on_breach == "report":
            return GuardedEdit(edit, report)
        if self.policy.on_breach == "stop":
            self.stopped = True
            return GuardedEdit(edit, report)
        self.editor.revert()
        if self.policy.on_breach == "roll-back":
            return GuardedEdit(None, report)
        return self._hand_over(facts)

    def _hand_over(self, facts: Facts) -> GuardedEdit:
        """Write facts by the memory method; they come off again where this passes a limit too."""
        edit = self.editor.edit(facts, self.policy.memory)
        report = self.check()
        if report.breaches:
            self.editor.revert()
            return GuardedEdit(None, report, handed_over=True)
        return GuardedEdit(edit, report, handed_over=True)

    def resume(self) -> None:
        """Let further batches be written after a stop."""
        self.stopped = False

    def check(self) -> GuardReport:
        """Look at the model as it is now."""
        editor = self.editor
        text_drift = None
        if self._text is not None:
            text_drift = drift(self._base, self._text.read(editor.view, editor.encoder))
        failed = self._failed_canaries()
        matrices = self._matrix_changes()
        report = GuardReport(
            text_drift, failed, len(self._expected), matrices, self._breaches(text_drift, failed, matrices)
        )
        self.reports.append(report)
        return report

    def _expected_answers(self) -> list[tuple[str, str]]:
        """Return each canary's prompt and answer: its own, or what the unedited model writes.

        Raises:
            ConfigError: the unedited model does not answer a canary by its answer, or writes nothing.
        """
        editor = self.editor
        unanswered = [canary.prompt for canary in self.canaries if not canary.answer]
        texts: dict[str, str] = {}
        if unanswered:
            written = generate(editor.view, editor.encoder, unanswered, max_new_tokens=_CANARY_TOKENS)
            texts = {prompt: item.text for prompt, item in zip(unanswered, written, strict=True)}
        pairs: list[tuple[str, str]] = []
        for canary in self.canaries:
            answer = canary.answer or texts[canary.prompt]
            if not answer.strip():
                raise ConfigError(
                    f"the unedited model writes nothing after the canary {canary.prompt!r}; give its answer"
                )
            pairs.append((canary.prompt, answer))
        scores = score_continuations(editor.view, editor.encoder, pairs) if pairs else []
        for canary, score in zip(self.canaries, scores, strict=True):
            if canary.answer and not score.exact:
                raise ConfigError(
                    f"the unedited model does not answer the canary {canary.prompt!r} by {canary.answer!r}; leave the "
                    "answer out, or take another canary"
                )
        self._base_answers = [score.argmax for score in scores]
        return pairs

    def _failed_canaries(self) -> list[str]:
        """Return the prompts after which the model would write another token than the unedited one somewhere."""
        if not self._expected:
            return []
        scores = score_continuations(self.editor.view, self.editor.encoder, self._expected)
        failed: list[str] = []
        for (prompt, _), score, base_answer in zip(self._expected, scores, self._base_answers, strict=True):
            if score.argmax != base_answer:
                failed.append(prompt)
        return failed

    def _matrix_changes(self) -> list[MatrixChange]:
        if self.policy.change is None and self.policy.spectral is None:
            return []
        factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for edit in attached(self.editor.model):
            if isinstance(edit, WeightEdit):
                for name, update in edit.updates.items():
                    factors.setdefault(name, []).append(factors_of(update))
        changes: list[MatrixChange] = []
        for name, pairs in factors.items():
            norm, largest = self._size_of(name)
            singular = _singular_values(pairs)
            update_norm = float(singular.norm())
            top = float(singular.max())
            changes.append(MatrixChange(name, update_norm / norm, top / largest, (update_norm / max(top, 1e-300)) ** 2))
        return changes

    def _size_of(self, name: str) -> tuple[float, float]:
        """Return Frobenius norm and largest singular value of an unedited matrix, worked out once."""
        if name not in self._sizes:
            matrix = MatrixName.parse(name)  # an expert's is a part of its parameter
            with unedited(self.editor.model):
                weight = matrix.of(self.editor.model.get_parameter(matrix.parameter).detach()).double().cpu()
            self._sizes[name] = (float(weight.norm()), float(torch.linalg.matrix_norm(weight, 2)))
        return self._sizes[name]

    def _breaches(
        self, text_drift: Drift | None, failed: Sequence[str], matrices: Sequence[MatrixChange]
    ) -> list[Breach]:
        policy, breaches = self.policy, list[Breach]()
        if text_drift is not None:
            ratio = text_drift.perplexity_ratio
            if policy.perplexity_ratio is not None and not ratio <= policy.perplexity_ratio:  # NaN is a breach
                breaches.append(Breach("perplexity_ratio", ratio, policy.perplexity_ratio))
            if policy.agreement is not None and text_drift.agreement < policy.agreement:
                breaches.append(Breach("agreement", text_drift.agreement, policy.agreement))
        if self._expected and policy.canaries is not None:
            share = 1 - len(failed) / len(self._expected)
            if share < policy.canaries:
                breaches.append(Breach("canaries", share, policy.canaries, ", ".join(failed[:3])))
        for matrix in matrices:
            if policy.change is not None and matrix.change > policy.change:
                breaches.append(Breach("change", matrix.change, policy.change, matrix.name))
            if policy.spectral is not None and matrix.spectral > policy.spectral:
                breaches.append(Breach("spectral", matrix.spectral, policy.spectral, matrix.name))
        return breaches


def _singular_values(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the singular values of ``Σ U Vᵀ``, float64: of a small matrix where the columns are few."""
    u = torch.cat([left for left, _ in pairs], dim=1).double()  # [d_out, r]
    v = torch.cat([right for _, right in pairs], dim=1).double()  # [d_in, r]
    if u.shape[1] >= min(len(u), len(v)):
        return torch.linalg.svdvals(u @ v.t())
    return torch.linalg.svdvals(torch.linalg.qr(u).R @ torch.linalg.qr(v).R.t())
