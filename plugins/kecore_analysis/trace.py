"""Causal tracing: which hidden states carry a fact (Meng et al., ROME, section 2, arXiv 2202.05262).

Three runs of a prompt are compared. The *clean* run gives the model's answer. In the *corrupted* run noise is added to
the embeddings of the subject's tokens, so that the answer becomes unlikely. The *corrupted run with restoration* is
the corrupted run in which one state is set back to what it was in the clean run. How much likelier the answer is in it
than in the corrupted run is the state's indirect effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from kecore.api.errors import RequestError

__all__ = ["KINDS", "ROLES", "Averages", "Known", "Trace", "average", "suggested_layers"]

KINDS = ("hidden", "mlp", "attention")
"""What can be restored: a layer's output, or what its feed-forward block or its attention adds to the stream."""

ROLES = (
    "first subject token", "middle subject tokens", "last subject token", "first later token", "further tokens",
    "last token",
)  # fmt: skip
"""The rows of averages over prompts of different lengths, as in the paper's figure 2."""

_LAST_SUBJECT_TOKEN = ROLES.index("last subject token")

_NEAR = 0.9  # share of the highest effect from which a layer counts as part of the peak


@dataclass(frozen=True, slots=True)
class Known:
    """A prompt whose answer the model may know.

    Args:
        prompt: the text.
        span: the subject's characters ``[start, end)`` in it.
    """

    prompt: str
    span: tuple[int, int]

    @classmethod
    def of(cls, prompt: str, subject: str) -> Known:
        """Find the subject's last occurrence in a prompt.

        Raises:
            RequestError: the subject is empty or not in the prompt.
        """
        start = prompt.rfind(subject)
        if not subject or start < 0:
            raise RequestError(f"the subject {subject!r} is not in the prompt {prompt!r}")
        return cls(prompt, (start, start + len(subject)))


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Effects of restoring each state of one prompt.

    Args:
        tokens: the prompt's tokens as text.
        subject: the subject's tokens, ``[first, last]``.
        answer: the model's most likely next token in the clean run.
        clean: its probability there.
        corrupted: its probability in the corrupted run, mean over noise samples.
        restored: by kind ``[tokens, layers]``: its probability with the state restored, mean over noise samples.
    """

    tokens: tuple[str, ...]
    subject: tuple[int, int]
    answer: str
    clean: float
    corrupted: float
    restored: Mapping[str, Tensor]

    def effect(self, kind: str) -> Tensor:
        """Return the indirect effect of each state, ``[tokens, layers]``."""
        return self.restored[kind] - self.corrupted

    def roles(self) -> list[int]:
        """Return the index into :data:`ROLES` of each token; -1 for those before the subject."""
        return [self._role(index) for index in range(len(self.tokens))]

    def _role(self, index: int) -> int:
        first, last = self.subject
        if index < first:
            return -1
        if index == last:
            return _LAST_SUBJECT_TOKEN  # of a subject of one token too
        if index == first:
            return ROLES.index("first subject token")
        if index < last:
            return ROLES.index("middle subject tokens")
        if index == len(self.tokens) - 1:
            return ROLES.index("last token")
        if index == last + 1:
            return ROLES.index("first later token")
        return ROLES.index("further tokens")


@dataclass(frozen=True, slots=True, eq=False)
class Averages:
    """Traces of many prompts together.

    Args:
        count: prompts.
        clean: mean probability of the answer in the clean run.
        corrupted: the same in the corrupted run.
        effects: by kind ``[roles, layers]``: average indirect effect; NaN for roles that no token has.
    """

    count: int
    clean: float
    corrupted: float
    effects: Mapping[str, Tensor]

    @property
    def total(self) -> float:
        """Average total effect: what the noise takes away."""
        return self.clean - self.corrupted


def average(traces: Sequence[Trace]) -> Averages:
    """Average indirect effects by the tokens' roles: each prompt's tokens of a role count together once.

    Raises:
        RequestError: there are no traces.
    """
    if not traces:
        raise RequestError("no prompts were traced; give at least one")
    effects: dict[str, Tensor] = {}
    for kind in traces[0].restored:
        rows = [_average_of_role(traces, kind, role) for role in range(len(ROLES))]
        effects[kind] = torch.stack(rows)  # [roles, layers]
    return Averages(
        count=len(traces),
        clean=fmean(trace.clean for trace in traces),
        corrupted=fmean(trace.corrupted for trace in traces),
        effects=effects,
    )


def _average_of_role(traces: Sequence[Trace], kind: str, role: int) -> Tensor:
    """Return the average effect of a role's tokens, ``[layers]``; NaN where no prompt has such a token."""
    by_prompt: list[Tensor] = []
    for trace in traces:
        has_role = torch.tensor(trace.roles()) == role  # [tokens]
        if has_role.any():
            by_prompt.append(trace.effect(kind)[has_role].mean(0))
    if not by_prompt:
        layers = traces[0].restored[kind].shape[1]
        return torch.full((layers,), torch.nan)
    return torch.stack(by_prompt).mean(0)


def suggested_layers(averages: Averages) -> tuple[int, tuple[int, ...]]:
    """Suggest where to edit: the layer whose restored feed-forward blocks bring most back at a token of the subject.

    That is the last one on average (section 2.2), but for single prompts it may be an earlier one.

    Returns:
        That layer, for methods that edit one, and the layers around it that bring nearly as much, for those that
        spread an edit.

    Raises:
        RequestError: feed-forward blocks were not traced.
    """
    if "mlp" not in averages.effects:
        raise RequestError("layers are suggested by the effects of feed-forward blocks; trace the kind 'mlp'")
    of_subject = averages.effects["mlp"][: _LAST_SUBJECT_TOKEN + 1].nan_to_num(-torch.inf)  # [roles, layers]
    effect = of_subject[of_subject.max(1).values.argmax()]  # [layers] of the role with the highest one
    best = int(effect.argmax())
    low = high = best
    while low > 0 and float(effect[low - 1]) >= _NEAR * float(effect[best]):
        low -= 1
    while high + 1 < len(effect) and float(effect[high + 1]) >= _NEAR * float(effect[best]):
        high += 1
    return best, tuple(range(low, high + 1))
