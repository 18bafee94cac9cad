"""Effects of an edit beside its facts: on held-out text, small tasks, unrelated prompts, and the edited matrices.

A :class:`Checkup` is taken of the unedited and of the edited model; :func:`changes` gives each figure before and after,
the difference, and its paired 95 % confidence interval: both models read the same text and answer the same items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, variance
from typing import TYPE_CHECKING, Any

import torch

from kecore.api.errors import ConfigError
from kecore.api.progress import Progress, silent
from kecore.edit import WeightEdit, attached, unedited
from kecore.evaluate.held_out import HeldOutText
from kecore.evaluate.intervals import Z
from kecore.evaluate.metrics import divergence
from kecore.inference.scoring import BATCH_TOKENS, next_tokens
from kecore.model import MatrixName
from kecore_analysis.harness import harness_scores
from kecore_analysis.tasks import TaskResult, TaskSet, run_tasks

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kecore.model import ModelView
    from kecore.text import Encoder

__all__ = [
    "Change",
    "Checkup",
    "MatrixHealth",
    "Perplexity",
    "changes",
    "checkup",
    "paired",
    "perplexity",
    "weight_health",
]


@dataclass(frozen=True, slots=True)
class Perplexity:
    """A model's losses on passages of text.

    Args:
        losses: summed negative log-likelihood of each passage's scored tokens, in nats.
        tokens: number of scored tokens of each passage.
    """

    losses: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def mean_loss(self) -> float:
        """Nats per token."""
        return math.fsum(self.losses) / sum(self.tokens)

    @property
    def value(self) -> float:
        """``exp`` of the mean loss; infinite for a model whose logits are not finite."""
        return math.exp(self.mean_loss) if self.mean_loss < 700 else math.inf


def perplexity(
    view: ModelView,
    encoder: Encoder,
    passages: Sequence[str],
    *,
    window: int = 256,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
) -> Perplexity:
    """Take the perplexity of plain text: every token but a passage's first, given those before it in the passage.

    Args:
        view: the model.
        encoder: its tokenizer, with the special tokens it puts before a text; no chat template is used.
        passages: texts, each scored by itself.
        window: most tokens of a passage; the rest is left out. Perplexities of different windows differ.
        batch_tokens: padded tokens of one micro-batch: speed and memory, not the result.
        progress: called after each micro-batch.

    Raises:
        ConfigError: the window is below 2.
        DataFormatError: no passage has two tokens.
    """
    text = HeldOutText.of(encoder, passages, window)
    reading = text.read(view, encoder, batch_tokens=batch_tokens, progress=progress)
    return Perplexity(reading.losses, tuple(map(len, reading.next_tokens)))


@dataclass(frozen=True, slots=True)
class Change:
    """A figure before and after an edit.

    Args:
        before: of the unedited model.
        after: of the edited one.
        difference: after minus before.
        half_width: half of the difference's paired 95 % confidence interval (normal approximation); None where
            there is one item only, or no items that could be paired.
        items: what the interval is over: items of a task, passages, prompts.
    """

    before: float
    after: float
    difference: float
    half_width: float | None
    items: int

    def to_json(self) -> dict[str, float | int | None]:
        """Return plain JSON values; what is not finite is null."""
        values: dict[str, float | int | None] = asdict(self)
        for name, value in values.items():
            if value is not None and not math.isfinite(value):
                values[name] = None
        return values


def paired(before: Sequence[float], after: Sequence[float]) -> Change:
    """Return the change of a mean over the same items.

    Raises:
        ConfigError: the items are not the same number, or there are none.
    """
    if len(before) != len(after) or not before:
        raise ConfigError(f"the same items are compared, got {len(before)} before and {len(after)} after")
    gaps = [b - a for a, b in zip(before, after, strict=True)]
    half_width = Z * math.sqrt(variance(gaps) / len(gaps)) if len(gaps) > 1 else None
    return Change(fmean(before), fmean(after), fmean(gaps), half_width, len(gaps))


def _perplexities(before: Perplexity, after: Perplexity) -> Change:
    """Return the difference of two perplexities.

    Its interval is that of the ratio of summed losses to tokens, carried over by the delta method:
    d exp(x) = exp(x) dx.
    """
    if before.tokens != after.tokens:
        raise ConfigError("the perplexities are of different passages")
    tokens, passages = sum(before.tokens), len(before.tokens)
    gaps = [b - a for a, b in zip(before.losses, after.losses, strict=True)]  # nats of each passage
    half_width = None
    if passages > 1 and all(map(math.isfinite, gaps)):
        mean_gap = math.fsum(gaps) / tokens  # nats per token
        residuals = [gap - mean_gap * count for gap, count in zip(gaps, before.tokens, strict=True)]
        squares = math.fsum(residual**2 for residual in residuals)
        deviation = math.sqrt(squares * passages / (passages - 1)) / tokens
        half_width = Z * deviation * after.value
    return Change(before.value, after.value, after.value - before.value, half_width, passages)


@dataclass(frozen=True, slots=True)
class Checkup:
    """The state of one model.

    Args:
        perplexity: of held-out text; None where none was given.
        tasks: task name to result.
        distributions: next-token log-probabilities ``[vocab]`` on unrelated prompts, to measure drift by.
        harness: harness task and metric to the value of each document; see :mod:`kecore_analysis.harness`.
    """

    perplexity: Perplexity | None = None
    tasks: Mapping[str, TaskResult] = field(default_factory=dict)
    distributions: tuple[Tensor, ...] = field(default=(), repr=False)
    harness: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def checkup(
    view: ModelView,
    encoder: Encoder,
    *,
    passages: Sequence[str] = (),
    tasks: Sequence[TaskSet] = (),
    prompts: Sequence[str] = (),
    harness: Sequence[str] = (),
    harness_limit: int | None = None,
    harness_folder: str | None = None,
    window: int = 256,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
) -> Checkup:
    """Examine a model as it is now.

    Args:
        view: the model.
        encoder: decides special tokens and template.
        passages: held-out text for :func:`perplexity`.
        tasks: task sets for :func:`~kecore_analysis.tasks.run_tasks`.
        prompts: unrelated prompts, whose next-token distributions are kept: vocabulary times 4 bytes each.
        harness: tasks of the Language Model Evaluation Harness; see :func:`~kecore_analysis.harness.harness_scores`.
        harness_limit: documents of each of these tasks; None for all.
        harness_folder: folder with further tasks of the harness.
        window: of the perplexity.
        batch_tokens: padded tokens of one micro-batch: speed and memory, not the result.
        progress: called after each micro-batch.

    Raises:
        MissingDependencyError: harness tasks are asked for and lm-eval is not installed.
        ConfigError: the harness has no such task.
        HubError: the data of a harness task cannot be fetched.
    """
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "progress": progress}
    return Checkup(
        perplexity=perplexity(view, encoder, passages, window=window, **options) if passages else None,
        tasks=run_tasks(view, encoder, tasks, **options),
        distributions=tuple(next_tokens(view, encoder, prompts, **options)) if prompts else (),
        harness=harness_scores(view, encoder, harness, limit=harness_limit, task_folder=harness_folder)
        if harness
        else {},
    )


def changes(before: Checkup, after: Checkup) -> dict[str, Change]:
    """Compare two checkups of the same things.

    Returns:
        ``perplexity``; ``drift``, the mean KL divergence in nats from the first to the second model's next-token
        distribution (a prompt whose divergence is not finite is left out of it, which ``items`` tells);
        ``agreement``, the share of prompts whose most probable next token is the same (not so where a distribution is
        not finite); and the accuracy of each task by its name, of each harness task as ``task.metric``.

    Raises:
        ConfigError: the two are not of the same text, tasks and prompts.
    """
    _check_comparable(before, after)
    differences: dict[str, Change] = {}
    if before.perplexity and after.perplexity:
        differences["perplexity"] = _perplexities(before.perplexity, after.perplexity)
    divergences: list[float] = []
    agreements: list[float] = []
    for old, new in zip(before.distributions, after.distributions, strict=True):
        agreements.append(1.0 if _agree(old, new) else 0.0)
        value = divergence(old, new)
        if value is not None:
            divergences.append(value)
    if divergences:
        differences["drift"] = paired([0.0] * len(divergences), divergences)
    if agreements:
        differences["agreement"] = paired([1.0] * len(agreements), agreements)
    for name, task in before.tasks.items():
        differences[name] = paired(task.correct, after.tasks[name].correct)
    for name, values in before.harness.items():
        differences[name] = paired([*values.values()], [*after.harness[name].values()])
    return differences


def _check_comparable(before: Checkup, after: Checkup) -> None:
    """Refuse two checkups of different things.

    Raises:
        ConfigError: says what differs.
    """
    same_text = (before.perplexity is None) == (after.perplexity is None)
    if not same_text or len(before.distributions) != len(after.distributions):
        raise ConfigError("the two checkups are of different things; take both with the same arguments")
    if [*before.tasks] != [*after.tasks] or [*before.harness] != [*after.harness]:
        raise ConfigError(f"the checkups hold different tasks: {[*before.tasks]} before, {[*after.tasks]} after")
    for name, values in before.harness.items():
        if [*values] != [*after.harness[name]]:
            raise ConfigError(f"the harness gave other documents of {name} after the edit than before")


def _agree(old: Tensor, new: Tensor) -> bool:
    """Return whether the most probable token is the same; a distribution that is not finite has none."""
    if old.isnan().any() or new.isnan().any():
        return False
    return int(old.argmax()) == int(new.argmax())


@dataclass(frozen=True, slots=True)
class MatrixHealth:
    """An edited matrix beside what it was.

    Args:
        name: the parameter.
        norm: Frobenius norm, before and after.
        spectral: largest singular value, before and after.
        condition: largest over smallest singular value, before and after; infinite for a singular matrix.
        stable_rank: squared Frobenius norm over squared spectral norm, before and after.
        change: Frobenius norm of the difference over that of the matrix before.
    """

    name: str
    norm: tuple[float, float]
    spectral: tuple[float, float]
    condition: tuple[float, float]
    stable_rank: tuple[float, float]
    change: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; an infinite condition number is null."""
        return {
            "name": self.name,
            "norm": list(self.norm),
            "spectral": list(self.spectral),
            "condition": [value if math.isfinite(value) else None for value in self.condition],
            "stable_rank": list(self.stable_rank),
            "change": self.change,
        }


def weight_health(model: nn.Module, progress: Progress = silent) -> list[MatrixHealth]:
    """Take norms and spectra of every matrix that the attached edits change, in float64.

    A singular value decomposition a matrix: seconds for a small model, minutes for a matrix of ten thousand columns.

    Args:
        model: with the edits on it.
        progress: called after each matrix.
    """
    names: dict[str, None] = {}  # each once, in order
    for edit in attached(model):
        if isinstance(edit, WeightEdit):
            names |= dict.fromkeys(edit.updates)
    matrices: list[MatrixHealth] = []
    parameters = dict(model.named_parameters())
    for name in names:
        matrix = MatrixName.parse(name)
        after = matrix.of(parameters[matrix.parameter].detach()).double()
        with unedited(model):
            before = matrix.of(parameters[matrix.parameter].detach()).double()
        old, new = torch.linalg.svdvals(before), torch.linalg.svdvals(after)  # descending
        matrices.append(
            MatrixHealth(
                name=name,
                norm=(float(before.norm()), float(after.norm())),
                spectral=(float(old[0]), float(new[0])),
                condition=(_condition(old), _condition(new)),
                stable_rank=(_stable_rank(old), _stable_rank(new)),
                change=float((after - before).norm() / before.norm()),
            )
        )
        progress("matrices", len(matrices), len(names))
    return matrices


def _condition(singular_values: Tensor) -> float:
    """Return the condition number of a matrix from its singular values in descending order."""
    smallest = float(singular_values[-1])
    return float(singular_values[0]) / smallest if smallest > 0 else math.inf


def _stable_rank(singular_values: Tensor) -> float:
    return float(singular_values.square().sum() / singular_values[0] ** 2)
