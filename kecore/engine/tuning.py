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
from kecore.memory import Need, Work, backward_bytes, logits_bytes
from kecore.model import ModelView
from kecore.model.sites import Beside, Output, Patch, Site, Start, Value
from kecore.text import Encoded, Encoder, Rows, join_context

__all__ = [
    "Objective",
    "Preserved",
    "PreservingConfig",
    "Targets",
    "Wording",
    "batch_need",
    "choose_layer",
    "estimate_items",
    "in_contexts",
    "train",
]

Objective = Literal["prompt_last", "target_new"]

_JOINT = 4  # tokens that a prefix opens with, and that stand between it and the prompt
_GRADIENT = 3  # times the work of a pass that stores nothing


class Counted(Protocol):
    """A batch that knows how many requests it holds."""

    @property
    def count(self) -> int:
        """Number of requests."""
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


def estimate_items(items: Sequence[Encoded], count: int, tokens: int, others: int = 0) -> list[Encoded]:
    """Return items as long and as many as training will have them, for an estimate of memory.

    Args:
        items: the bare prompts with their targets.
        count: prefixes of each that :func:`in_contexts` will put before it.
        tokens: length of each prefix in tokens.
        others: prompts about others that will be preserved for each.
    """
    estimates = list(items)
    prefix_tokens = tokens + _JOINT
    for item in items:
        prefix = item.ids[:1] * prefix_tokens  # any token will do
        estimates += [replace(item, ids=(*prefix, *item.ids), start=item.start + prefix_tokens)] * count
        estimates += [item] * others
    return estimates


def choose_layer(view: ModelView, layer: int | None, depth: float) -> int:
    """Return the tuned layer: the one that was named, or the one at a depth.

    Raises:
        LayerError: the model has no such layer.
    """
    if layer is None:
        return at_depth(view, depth, depth)[0]
    return view.layer(layer).index


def batch_need(
    view: ModelView, items: Sequence[Encoded], batch_size: int, layer: int, parts: Mapping[str, int], *, epochs: int
) -> Need:
    """Return the memory that training on whole batches needs, which are not cut further.

    Args:
        view: the model.
        items: every prompt with its target.
        batch_size: items of a batch.
        layer: the lowest layer that is trained.
        parts: bytes held all the time, by name.
        epochs: passes over all items, at the most.
    """
    tokens = sum(len(item.ids) for item in items)
    target_tokens = sum(len(item.ids) - item.start for item in items)
    longest = max(len(item.ids) for item in items)
    batch_tokens = longest * min(batch_size, len(items))
    # Logits are computed at targets only; their share falls on every token, rounded up.
    logits_per_token = (target_tokens * logits_bytes(view) + tokens - 1) // tokens
    rounds = _GRADIENT * epochs
    work = Work(
        passes=rounds * math.ceil(len(items) / batch_size),
        tokens=rounds * tokens,
        layers=len(view.layers) - layer,
        logits=rounds * target_tokens,
    )
    return Need("tune", parts, backward_bytes(view, layer) + logits_per_token, batch_tokens, batch_tokens, work=work)


@dataclass(frozen=True, slots=True)
class Preserved:
    """Prompts whose next token's distribution training preserves.

    Args:
        items: the prompts, without targets.
        weight: factor of their KL in the loss.
    """

    items: Sequence[Encoded]
    weight: float


class PreservingConfig(MethodConfig):
    """Configuration of methods that can preserve prompts about others while they are trained on the facts."""

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

    def prompts_to_preserve(self, encoder: Encoder, requests: Sequence[EditRequest]) -> Preserved | None:
        """Return the requests' prompts about others, each once; None where none are to be preserved."""
        if not self.others or not self.others_weight:
            return None
        passages = load_passages()[: self.others]
        texts: dict[str, None] = {}  # an ordered set
        for request in requests:
            texts.update(dict.fromkeys(prompts_about_others(request, passages)))
        return Preserved([encoder.encode(text) for text in texts], self.others_weight)


class Targets:
    """Prompts with targets as token rows; the layers below the tuned one are run once.

    Rows are laid out as ``prompt target padding``, then ``prompt padding`` for prompts that training preserves.

    Args:
        view: the model, frozen by the caller.
        encoder: its tokenizer.
        items: every prompt with its target.
        layer: the lowest layer that is tuned.
        objective: ``target_new`` asks for a target's tokens where they stand, ``prompt_last`` for all of them at the
            prompt's last token.
        preserved: further prompts, whose next token's distribution is to stay what the model gives now.

    Attributes:
        count: number of items.
        rows: token rows, aligned at their first token.
        row: ``[targets]``, row of each target's token.
        column: ``[targets]``, column that predicts it.
        token: ``[targets]``, its id.
        length: ``[count]`` float32, tokens of each target.
        first: where passes begin: at the tuned layer, with the hidden states below it; None at the first layer.
    """

    def __init__(
        self,
        view: ModelView,
        encoder: Encoder,
        items: Sequence[Encoded | Located],
        layer: int,
        objective: Objective,
        preserved: Preserved | None = None,
    ) -> None:
        self.view, self.layer, self.count = view, layer, len(items)
        at_prompt_end = objective == "prompt_last"
        ids: list[tuple[int, ...]] = []
        targets: list[tuple[int, int, int]] = []  # row, column that predicts, token
        for row, item in enumerate(items):
            ids.append(item.ids[: item.start] if at_prompt_end else item.ids)
            for position in range(item.start, len(item.ids)):
                column = item.start - 1 if at_prompt_end else position - 1
                targets.append((row, column, item.ids[position]))
        self.row, self.column, self.token = torch.tensor(targets, device=view.device).t()  # [targets] each
        self.length = torch.bincount(self.row).float()  # [count]
        preserved_items: Sequence[Encoded] = ()
        self.weight = 0.0
        if preserved is not None:
            preserved_items, self.weight = preserved.items, preserved.weight
        ids += [item.ids for item in preserved_items]
        self.rows: Rows = encoder.rows(ids).to(view.device)
        last_row = len(items) + torch.arange(len(preserved_items), device=view.device)  # [preserved]
        last_columns = [len(item.ids) - 1 for item in preserved_items]
        last_column = torch.tensor(last_columns, device=view.device, dtype=torch.long)  # [preserved]
        # Where logits are read: at the targets, then at the last token of what is preserved.
        self._positions = torch.cat([self.row, last_row]), torch.cat([self.column, last_column])
        self.first: Start | None = None
        if layer:
            below = Output(layer - 1)
            with torch.no_grad():
                self.first = Start(layer, view.run(self.rows, taps=[below], last=below.layer)[below])
        self._unedited: Tensor | None = None  # [preserved, vocab], log-probabilities of the model as it is now
        if preserved is not None:
            with torch.no_grad():
                self._unedited = self._logits()[len(self.token) :].log_softmax(-1)

    def _logits(self, add: Mapping[int, Tensor | Callable[[Tensor], Tensor]] | None = None) -> Tensor:
        """Return logits ``[targets + preserved, vocab]`` float32: at the targets, then at preserved prompts' ends."""
        patches: dict[Site, Patch] = {Value(layer): Beside(change) for layer, change in (add or {}).items()}
        return self.view.run(self.rows, patches=patches, first=self.first, at=self._positions).logits.float()

    def scores(self, add: Mapping[int, Tensor | Callable[[Tensor], Tensor]] | None = None) -> tuple[Tensor, Tensor]:
        """Return the log-probability of each target, ``[count]`` float32, and the weighted KL of what is preserved.

        Args:
            add: layer to what acts beside its value projection; see :class:`~kecore.model.sites.Beside`.
        """
        target_logits, preserved_logits = self._logits(add).tensor_split([len(self.token)])
        token_logits = target_logits.gather(1, self.token[:, None]).squeeze(1)  # [targets]
        token_log_probs = token_logits - target_logits.logsumexp(-1)
        zeros = torch.zeros(self.count, device=token_logits.device)
        log_probs = zeros.index_add(0, self.row, token_log_probs)  # [count]
        if self._unedited is None:
            return log_probs, log_probs.new_zeros(())
        edited = preserved_logits.log_softmax(-1)  # [preserved, vocab]
        kl = (edited.exp() * (edited - self._unedited)).sum(-1).mean()  # KL(edited | unedited)
        return log_probs, self.weight * kl

    def log_probs(self, add: Mapping[int, Tensor | Callable[[Tensor], Tensor]] | None = None) -> Tensor:
        """Return the log-probability of each target, ``[count]`` float32; see :meth:`scores`."""
        log_probs, _ = self.scores(add)
        return log_probs

    def loss(self, add: Mapping[int, Tensor | Callable[[Tensor], Tensor]] | None = None) -> Tensor:
        """Return the mean over requests of the mean negative log-likelihood of the target's tokens, plus the KL."""
        log_probs, kl = self.scores(add)
        return -(log_probs / self.length).mean() + kl


def train(
    context: MethodContext,
    parameters: Sequence[Tensor],
    rate: float,
    epochs: int,
    batches: Callable[[int], Sequence[B]],
    loss: Callable[[B], Tensor],
    *,
    stop: float = 0.0,
    skip: float = 0.0,
    after: Callable[[int], None] = lambda _: None,
    optimizer: Literal["adam", "sgd"] = "adam",
) -> list[float]:
    """Minimise a loss, one update a batch.

    Args:
        context: told of progress.
        parameters: the trained tensors.
        rate: learning rate.
        epochs: passes over all requests, at the most.
        batches: gives the batches of a pass.
        loss: gives the loss of a batch: a value for each of its requests, ``[count]``, or their mean.
        stop: training ends when a pass has a mean loss below this. Where every request has a value of its own, none
            may be above it, and one that is below takes no part in the update, so that no fact pays for another.
        skip: a batch whose mean loss is below this is left out of the pass: it counts in the loss, and is not tuned.
        after: called after every update, with the number of updates so far.
        optimizer: Adam, or plain gradient descent.

    Returns:
        The mean loss of each pass.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
    """
    kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    optimiser = kinds[optimizer](parameters, lr=rate)
    epoch_losses: list[float] = []
    updates = 0
    for epoch in range(epochs):
        loss_sum, requests, worst = 0.0, 0, -math.inf
        for batch in batches(epoch):
            optimiser.zero_grad()
            batch_loss = loss(batch)  # [count], or their mean
            if not bool(batch_loss.isfinite().all()):
                raise NonFiniteError("the fine-tuning loss became NaN or infinite; lower the learning rate")
            objective = batch_loss
            if batch_loss.ndim:  # one loss for each request
                objective = batch_loss * (batch_loss.detach() >= stop)
                worst = max(worst, float(batch_loss.detach().max()))
            mean_loss = float(batch_loss.detach().mean())
            loss_sum += mean_loss * batch.count
            requests += batch.count
            if mean_loss < skip:
                continue
            objective.mean().backward()
            optimiser.step()
            updates += 1
            after(updates)
        epoch_losses.append(round(loss_sum / requests, 5))
        context.progress("tune", epoch + 1, epochs)
        if max(epoch_losses[-1], worst) < stop:
            break
    return epoch_losses
