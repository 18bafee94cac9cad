"""What fine-tuning methods share: rows of targets with their losses, and a loop over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from kecore.api.config import MethodConfig
from kecore.api.errors import NonFiniteError
from kecore.api.method import MethodContext
from kecore.api.types import EditRequest
from kecore.batch import Located, RequestBatch
from kecore.engine.contexts import of_session
from kecore.engine.layers import at_depth
from kecore.engine.texts import load_passages, prompts_about_others
from kecore.memory import Need, backward_bytes, logits_bytes
from kecore.model import ModelView
from kecore.text import Encoded, Encoder, Rows, join_context

__all__ = [
    "Kept",
    "KeptConfig",
    "Objective",
    "Targets",
    "Wording",
    "batch_need",
    "chosen_layer",
    "in_contexts",
    "lengthened",
    "train",
]

Objective = Literal["prompt_last", "target_new"]

_JOINT = 4  # tokens that a prefix opens with, and that stand between it and the prompt


class Counted(Protocol):
    """A batch that knows how many requests it holds."""

    @property
    def count(self) -> int:
        """Requests."""
        ...


B = TypeVar("B", bound=Counted)


@dataclass(frozen=True, slots=True)
class Wording:
    """One way to ask for a request's target.

    Args:
        request: the request, with what stands before its prompt.
        encoded: its prompt with its target.
    """

    request: EditRequest
    encoded: Encoded


def in_contexts(
    view: ModelView, context: MethodContext, batch: RequestBatch, count: int, tokens: int
) -> list[list[Wording]]:
    """Return each request as it stands, then behind ``count`` prefixes that the model writes.

    Args:
        view: the model, frozen by the caller.
        context: holds the seed and what earlier edits sampled.
        batch: the requests.
        count: number of prefixes.
        tokens: length of each in tokens.
    """
    encodings = batch.encodings  # refuses what does not fit before anything takes long
    prefixes = [text for text in of_session(view, context, count, tokens) if text]
    wordings: list[list[Wording]] = []
    for request, encoded in zip(batch.requests, encodings, strict=True):
        wordings.append([Wording(request, encoded)])
        for prefix in prefixes:
            behind = replace(request, prompt=join_context(prefix, request.prompt))
            wordings[-1].append(Wording(behind, batch.encoder.encode(behind.text, behind.target)))
    return wordings


def lengthened(items: Sequence[Encoded], count: int, tokens: int, others: int = 0) -> list[Encoded]:
    """As long and as many as :func:`in_contexts` and :class:`Kept` make prompts, for an estimate of memory."""
    tokens += _JOINT
    longer = (replace(item, ids=(*item.ids[:1] * tokens, *item.ids), start=item.start + tokens) for item in items)
    return [*items, *(item for item in longer for _ in range(count)), *(item for item in items for _ in range(others))]


def chosen_layer(view: ModelView, layer: int | None, depth: float) -> int:
    """The tuned layer: the one that was named, or by depth.

    Raises:
        LayerError: the model has no such layer.
    """
    return at_depth(view, depth, depth)[0] if layer is None else view.layer(layer).index


def batch_need(
    view: ModelView, items: Sequence[Encoded], batch_size: int, layer: int, parts: Mapping[str, int]
) -> Need:
    """Memory of training on whole batches, which are not cut further.

    Args:
        view: the model.
        items: every prompt with its target.
        batch_size: of them at a time.
        layer: the lowest layer that is trained.
        parts: bytes held all the time.
    """
    every, longest = sum(len(item.ids) for item in items), max(len(item.ids) for item in items)
    places = sum(len(item.ids) - item.start for item in items)
    batch = longest * min(batch_size, len(items))
    token = backward_bytes(view, layer) + -(-places * logits_bytes(view) // every)
    return Need("tune", parts, token, batch, batch)


@dataclass(frozen=True, slots=True)
class Kept:
    """Prompts that training keeps as they are.

    Args:
        items: the prompts, without targets.
        weight: factor of their KL in the loss.
    """

    items: Sequence[Encoded]
    weight: float


class KeptConfig(MethodConfig):
    """What of the rest a method may be told to keep while it is trained on the facts."""

    others: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Further subjects of each request's own prompt, for which the next token's distribution is kept "
        "(kecore's addition: none).",
    )
    others_weight: float = Field(
        default=1.0,
        ge=0,
        description="Factor of that KL(edited | unedited), a mean over prompts, in the loss (kecore's choice).",
    )

    def kept(self, encoder: Encoder, requests: Sequence[EditRequest]) -> Kept | None:
        """The prompts about others; None where none are asked for."""
        if not self.others or not self.others_weight:
            return None
        words = load_passages()[: self.others]
        texts = [text for request in requests for text in prompts_about_others(request, words)]
        return Kept([encoder.encode(text) for text in dict.fromkeys(texts)], self.others_weight)


class Targets:
    """Prompts with targets as token rows; the layers below the tuned one are run once.

    Args:
        view: the model.
        items: every prompt with its target.
        layer: the lowest layer that is tuned.
        objective: whether a target's tokens are asked for where they stand, or all at the prompt's last token.
        kept: further prompts, whose answers are to stay those that the model gives now.
    """

    def __init__(
        self,
        view: ModelView,
        encoder: Encoder,
        items: Sequence[Encoded | Located],
        layer: int,
        objective: Objective,
        kept: Kept | None = None,
    ) -> None:
        self.view, self.layer, self.count = view, layer, len(items)
        self.weight, held = (kept.weight, kept.items) if kept else (0.0, ())
        if objective == "prompt_last":
            ids = [item.ids[: item.start] for item in items]
            places = [(i, e.start - 1, token) for i, e in enumerate(items) for token in e.ids[e.start :]]
        else:
            ids = [item.ids for item in items]
            places = [(i, j - 1, e.ids[j]) for i, e in enumerate(items) for j in range(e.start, len(e.ids))]
        ids = [*ids, *(item.ids for item in held)]
        self.rows: Rows = encoder.rows(ids).to(view.device)
        self.row, self.column, self.token = torch.tensor(places, device=view.device).t()
        self.length = torch.bincount(self.row).float()
        ends = [(len(items) + i, len(item.ids) - 1) for i, item in enumerate(held)]
        last = torch.tensor(ends, device=view.device, dtype=torch.long).reshape(-1, 2).t()
        self._asked = torch.cat([self.row, last[0]]), torch.cat([self.column, last[1]])
        self.resume = None
        if layer:
            with torch.no_grad():
                below = view.forward(self.rows, stop=layer - 1, hidden=[layer - 1]).hidden[layer - 1]
            self.resume = (layer, below)
        self._before = None
        if kept:
            with torch.no_grad():
                self._before = self._answers()[len(self.token) :].log_softmax(-1)

    def _answers(self, add: Mapping[int, Tensor | Callable[[Tensor], Tensor]] | None = None) -> Tensor:
        """Logits where the targets' tokens are asked for, then at the last token of what is kept; float32."""
        out = self.view.forward(self.rows, resume=self.resume, at=self._asked, add=add)
        return out.logits.float()  # type: ignore[union-attr]

    def scores(self, add: Mapping[int, Tensor | Callable[[Tensor], Tensor]] | None = None) -> tuple[Tensor, Tensor]:
        """Log-probability of each target, ``[count]`` float32, and the weighted KL of what is kept, a scalar.

        Args:
            add: changes of value projections; see :meth:`ModelView.forward`.
        """
        logits, others = self._answers(add).tensor_split([len(self.token)])
        each = logits.gather(1, self.token[:, None]).squeeze(1) - logits.logsumexp(-1)
        found = torch.zeros(self.count, device=each.device).index_add(0, self.row, each)
        if self._before is None:
            return found, found.new_zeros(())
        now = others.log_softmax(-1)
        return found, self.weight * (now.exp() * (now - self._before)).sum(-1).mean()

    def log_probs(self, add: Mapping[int, Tensor | Callable[[Tensor], Tensor]] | None = None) -> Tensor:
        """Log-probability of each target, ``[count]`` float32; see :meth:`scores`."""
        return self.scores(add)[0]

    def loss(self, add: Mapping[int, Tensor | Callable[[Tensor], Tensor]] | None = None) -> Tensor:
        """Mean over requests of the mean negative log-likelihood of the target's tokens, and what keeping costs."""
        found, moved = self.scores(add)
        return -(found / self.length).mean() + moved


def train(
    context: MethodContext,
    parameters: Sequence[Tensor],
    rate: float,
    epochs: int,
    batches: Callable[[int], Sequence[B]],
    loss: Callable[[B], Tensor],
    *,
    stop: float = 0.0,
    after: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Minimise a loss by Adam, one update a batch.

    Args:
        context: told of progress.
        parameters: what is trained.
        rate: learning rate.
        epochs: passes over all requests, at the most.
        batches: the batches of a pass.
        loss: of a batch: a value for each of its requests, ``[count]``, or their mean.
        stop: training ends when a pass has a mean loss below this. Of requests with values of their own none may be
            above it, and one that is below takes no part in the update, so that no fact pays for another.
        after: called after every update, with the number of updates so far.

    Returns:
        The mean loss of each pass.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
    """
    optimizer = torch.optim.Adam(parameters, lr=rate)
    losses: list[float] = []
    updates = 0
    for epoch in range(epochs):
        total, seen, worst = 0.0, 0, -math.inf
        for batch in batches(epoch):
            optimizer.zero_grad()
            value = loss(batch)
            if not bool(value.isfinite().all()):
                raise NonFiniteError("the fine-tuning loss became NaN or infinite; lower the learning rate")
            (value * (value.detach() >= stop) if value.ndim else value).mean().backward()
            optimizer.step()
            updates += 1
            after(updates)
            found = value.detach()
            total, seen = total + float(found.mean()) * batch.count, seen + batch.count
            worst = max(worst, float(found.max())) if found.ndim else worst
        losses.append(round(total / seen, 5))
        context.progress("tune", epoch + 1, epochs)
        if max(losses[-1], worst) < stop:
            break
    return losses
