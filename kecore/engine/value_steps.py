"""One step of the values' optimisation: the loss of each group on its rows, and the update that follows from it.

All groups of a micro-batch advance together; every step, clamp and stop is a group's own. See
:mod:`kecore.engine.values` for the objective and the two optimisers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kecore.api.errors import KecoreWarning, NonFiniteError
from kecore.batch import Located
from kecore.engine.graphs import Function, record
from kecore.engine.replay import Replay
from kecore.model import ModelView
from kecore.text import Encoder

__all__ = ["Coupling", "Finished", "Row", "ValueBatch", "ValueSettings", "all_most_probable", "said"]

_BETAS = (0.9, 0.999)  # of Adam
_EPS = 1e-8
_MOMENTUM = 0.5  # of gradient descent
_FLOOR = 0.1  # what its steps shrink to
_COMPACT = 0.75  # rows are gathered anew once a quarter of the groups has finished
_RECORDED = ("cuda",)  # devices whose steps can be replayed

Finished = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""``finished(logits [k, vocab], token [k], group [k], u)`` to ``[u]``, true for each of ``u`` groups that is done; of
the logits that predict the tokens of targets. It may not wait for the device: a step can be recorded."""


def all_most_probable(logits: Tensor, token: Tensor, group: Tensor, u: int) -> Tensor:
    """Return the groups whose targets' tokens are the most probable ones in all contexts: a :data:`Finished`.

    ENCORE's early stop (arXiv 2502.01636).
    """
    missed = (logits.argmax(-1) != token).long()  # [k]
    return torch.zeros(u, dtype=torch.long, device=logits.device).index_add(0, group, missed) == 0


@dataclass(frozen=True, slots=True)
class ValueSettings:
    """Numbers of the optimisation.

    Args:
        steps: evaluations of the loss (one fewer updates).
        optimizer: ``"gradient"`` or ``"adam"``.
        learning_rate: length of the first step relative to ``‖h‖`` for ``gradient`` (it falls to a tenth of that
            on a half cosine); Adam's rate, in units of the hidden state, for ``adam``.
        length_penalty: factor of ``‖delta‖ / ‖h‖``.
        weight_decay: factor of ``‖delta‖ / ‖h‖²``, as the published code has it.
        clamp: largest ``‖delta‖ / ‖h‖``.
        kl_weight: factor of KL(edited ‖ original) on ``"<subject> is a"``.
        stop_loss: a group whose whole loss is below this is finished.
        finished: a further reason to finish a group; None for none.
        noise: Gaussian noise on the hidden states of the tokens behind the subject, in units of each coordinate's
            standard deviation; anew at each step, on every context but the bare prompt. A value that must work
            through it does not hang on the prompt's wording. None of the published methods has it.
        beside: from model and layer to a module of that layer: a second vector, added to the module's output, is
            optimised together with the value and forgotten afterwards. Both are then relative to the norms of the
            outputs that they are added to. None for the value alone.
        precision: type of the frozen weights and activations; ``delta``, its gradient sums and the loss
            are float32 in any case.
        graphs: record a step as a CUDA graph and replay it, again after rows were dropped. Spares the host the launch
            of some thousand kernels a step, which is what small micro-batches wait for. Without effect elsewhere.
    """

    steps: int = 20
    optimizer: Literal["gradient", "adam"] = "gradient"
    learning_rate: float = 0.1
    length_penalty: float = 0.2
    weight_decay: float = 0.0
    clamp: float = 4.0
    kl_weight: float = 0.0625
    stop_loss: float = 1e-2
    finished: Finished | None = None
    noise: float = 0.5
    beside: Callable[[ModelView, int], nn.Module] | None = None
    precision: torch.dtype | None = None
    graphs: bool = False


class Coupling(Protocol):
    """A further term of the values' loss, in which the values of several groups meet.

    Micro-batches are optimised one after another: :meth:`loss` is asked about the groups of the present one, and
    :meth:`keep` hands over their values once they are finished.
    """

    def loss(self, delta: Tensor, members: Tensor) -> Tensor:
        """Return the term of some groups.

        Args:
            delta: ``[b, d_model]``, their values as they are now; the term is differentiated by them.
            members: ``[b]``, which groups they are.

        Returns:
            ``[b]``.
        """
        ...

    def keep(self, delta: Tensor, members: Tensor) -> None:
        """Take the finished values ``[b, d_model]`` of some groups, for the groups that come after."""
        ...


@dataclass(frozen=True, slots=True)
class Row:
    """A text of a micro-batch; the drawing in docs/concepts.md shows several, laid out.

    Args:
        group: index of its group in the micro-batch.
        located: its tokens, with the subject's last one.
        context: index of the context that it stands behind.
        is_kl: it asks what the subject is, and has no target: its next-token distribution is to stay.
    """

    group: int
    located: Located
    context: int = 0
    is_kl: bool = False

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens that are run: a target's last token is predicted, never read."""
        return self.located.ids if self.is_kl else self.located.ids[:-1]

    @property
    def columns(self) -> range:
        """The tokens whose logits count: those before each token of the target, or the last one."""
        if self.is_kl:
            return range(len(self.located.ids) - 1, len(self.located.ids))
        return range(self.located.start - 1, len(self.located.ids) - 1)


def said(logits: Tensor, token: Tensor, original: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What logits say of targets, and how far they are from what was said before.

    Args:
        logits: ``[k, vocab]``, those of targets first.
        token: ``[t]``, the target tokens.
        original: ``[k - t, vocab]`` log-probabilities that the rest is compared with; None for its own.

    Returns:
        Negative log-likelihoods ``[t]``, KL(now ‖ original) ``[k - t]`` in nats, both differentiable once, and the
        log-probabilities of the rest, which are not.
    """
    return _Said.apply(logits, token, original)  # type: ignore[no-any-return]


class _Said(torch.autograd.Function):
    """:func:`said` in one buffer: logits are the widest tensors here, and autograd would make eight of them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, token: Tensor, original: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        now = logits.log_softmax(-1, dtype=torch.float32)
        targets, rest = now[: len(token)], now[len(token) :]
        nll = -targets.gather(1, token[:, None]).flatten()
        first = rest.clone()
        apart = torch.zeros_like(rest) if original is None else rest - original
        kl = (rest.exp() * apart).sum(-1)
        ctx.now, ctx.apart, ctx.token, ctx.dtype = now, apart.sub_(kl[:, None]), token, logits.dtype
        ctx.mark_non_differentiable(first)
        return nll, kl, first

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, nll: Tensor, kl: Tensor, _first: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        # d nll / d logits = p - onehot, d kl / d logits = p (log p - log q - kl).
        grad, token = ctx.now.exp_(), ctx.token
        grad[: len(token)].mul_(nll[:, None])
        grad[: len(token)].scatter_add_(1, token[:, None], -nll[:, None])
        grad[len(token) :].mul_(ctx.apart).mul_(kl[:, None])
        return grad.to(ctx.dtype), None, None


class _Work:
    """Rows of some groups, and where in them the loss is read.

    Args:
        replay: runs the rows.
        group: ``[rows]``, the group of each.
        context: ``[rows]``, index of its context; 0 for the bare prompt and for an essence.
        essence: ``[rows]``, true where a row stands for the KL term.
        row: ``[k]``, rows of the positions whose logits are read, those of targets first.
        place: ``[k]``, their token indices.
        token: ``[k]``, the target token; -1 on essence rows.
        spoken: how many of the positions are those of targets.
    """

    def __init__(
        self,
        replay: Replay,
        group: Tensor,
        context: Tensor,
        essence: Tensor,
        row: Tensor,
        place: Tensor,
        token: Tensor,
        spoken: int,
    ) -> None:
        self.replay, self.group, self.context, self.essence = replay, group, context, essence
        self.row, self.place, self.token, self.spoken = row, place, token, spoken

    def keep(self, mask: Tensor) -> _Work:
        """The rows where ``mask [rows]`` is true."""
        rows = mask.nonzero().flatten()
        index = torch.full((len(mask),), -1, device=mask.device)
        index[rows] = torch.arange(len(rows), device=mask.device)
        chosen = mask[self.row]
        return _Work(
            self.replay.select(rows),
            *(self.group[rows], self.context[rows], self.essence[rows]),
            *(index[self.row[chosen]], self.place[chosen], self.token[chosen]),
            int(chosen[: self.spoken].sum()),
        )


def _lay_out(rows: Sequence[Row], replay: Replay, device: torch.device) -> _Work:
    """Return which logits of which rows count, as tensors."""
    asked: list[tuple[int, int, int]] = []  # row, column in it, and the token to be predicted there, -1 for none
    for index, row in enumerate(rows):
        for column in row.columns:
            token = -1 if row.is_kl else row.located.ids[column + 1]
            asked.append((index, column, token))
    row_of, column, token = torch.tensor(asked, device=device).t()  # [k] each
    group = torch.tensor([row.group for row in rows], device=device)
    context = torch.tensor([row.context for row in rows], device=device)
    is_kl = torch.tensor([row.is_kl for row in rows], device=device)
    return _Work(replay, group, context, is_kl, row_of, column, token, int((token >= 0).sum()))


class ValueBatch:
    """The optimisation of some groups, advanced step by step."""

    def __init__(
        self,
        view: ModelView,
        encoder: Encoder,
        rows: Sequence[Row],
        layer: int,
        settings: ValueSettings,
        mode: str | None,
        bank: Tensor,
        others: tuple[Coupling, Tensor] | None = None,
    ) -> None:
        self.settings, self.bank, self.others = settings, bank, others
        device = view.device
        lookups = [row.located.lookup for row in rows]
        contexts = [row.context for row in rows]
        beside = None if settings.beside is None else settings.beside(view, layer)
        replay = Replay(view, encoder, [row.ids for row in rows], lookups, layer, mode, beside, contexts)
        self.mode, self.parts = replay.mode, replay.parts
        self.work = _lay_out(rows, replay, device)
        first_row: dict[int, int] = {}  # of each group: its first request's bare prompt
        for index, row in enumerate(rows):
            first_row.setdefault(row.group, index)
        count = len(first_row)
        self.reference = replay.lookup_norm(torch.tensor([first_row[group] for group in range(count)], device=device))
        self.delta = torch.zeros(count, self.parts * view.width, device=device)
        self.first, self.second = torch.zeros_like(self.delta), torch.zeros_like(self.delta)
        self.loss = torch.full((count,), float("nan"), device=device)
        self.steps = torch.zeros(count, dtype=torch.long, device=device)
        self.active = torch.ones(count, dtype=torch.bool, device=device)
        self.original: Tensor | None = None  # log-probabilities on the essence prompts, by group
        self.recording = settings.graphs and device.type in _RECORDED and others is None
        self.recorded: Function | None = None  # a step of the rows at hand

    def step(self, *, last: bool) -> bool:
        """Evaluate the loss and, unless ``last``, update the groups that are not finished."""
        s = self.settings
        loss, moving, gradient = self._evaluate(last)
        if not bool(torch.isfinite(loss[self.active]).all()):
            raise NonFiniteError("the loss of a target value became NaN or infinite; lower the learning rate")
        self.loss = torch.where(self.active, loss, self.loss)
        self.steps += self.active
        if last or not bool(moving.any()):
            return False
        t = int(self.steps.max())
        moved = self.delta - (self._adam if s.optimizer == "adam" else self._descent)(gradient(), t)
        mask = moving[:, None]
        scale = (s.clamp * self.reference / self._lengths(moved)).clamp(max=1.0)
        self.delta = torch.where(mask, self._scaled(moved, scale), self.delta)
        self._compact(moving)
        return True

    def _evaluate(self, last: bool) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
        """Loss of each group, which of them go on, and what gives the gradient of those."""
        noise = self._noise()
        inputs = (self.delta, self.active, *(() if noise is None else (noise,)))
        if self.recording and self.recorded is None and bool(self.steps.any()) and not last:
            try:
                self.recorded = record(self._whole, inputs)
            except RuntimeError as error:
                self.recording = False
                warnings.warn(f"steps are not replayed as CUDA graphs: {error}", KecoreWarning, stacklevel=4)
        if self.recorded is not None:
            loss, moving, gradient = self.recorded(*inputs)
            return loss, moving, lambda: gradient
        delta = self.delta.clone().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            loss, moving = self._loss(delta, self.active, noise)
        return loss.detach(), moving, lambda: _slope(loss, moving, delta)

    def _whole(self, delta: Tensor, active: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of each group, which of them go on, and the gradient of those."""
        delta = delta.detach().requires_grad_()
        loss, moving = self._loss(delta, active, noise)
        return loss.detach(), moving, _slope(loss, moving, delta)

    # Groups that have stopped keep their vector whatever these return, so neither masks its sums.

    def _adam(self, gradient: Tensor, t: int) -> Tensor:
        self.first = _BETAS[0] * self.first + (1 - _BETAS[0]) * gradient
        self.second = _BETAS[1] * self.second + (1 - _BETAS[1]) * gradient**2
        root = (self.second / (1 - _BETAS[1] ** t)).sqrt() + _EPS
        return self.settings.learning_rate * (self.first / (1 - _BETAS[0] ** t)) / root

    def _descent(self, gradient: Tensor, t: int) -> Tensor:
        direction = gradient / gradient.norm(dim=1, keepdim=True).clamp(min=torch.finfo(gradient.dtype).tiny)
        self.first = _MOMENTUM * self.first + direction
        fall = _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * t / self.settings.steps))
        return self._scaled(self.first, self.settings.learning_rate * fall * self.reference)

    def _lengths(self, vectors: Tensor) -> Tensor:
        """Norms of the parts, ``[u, parts]``."""
        return vectors.unflatten(1, (self.parts, -1)).norm(dim=2)

    def _scaled(self, vectors: Tensor, factor: Tensor) -> Tensor:
        """Each part times its factor ``[u, parts]``."""
        return (vectors.unflatten(1, (self.parts, -1)) * factor[:, :, None]).flatten(1)

    def _loss(self, delta: Tensor, active: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Loss of each group ``[u]``, of one whose rows are gone its penalty alone; and which of the active go on."""
        s, u, work = self.settings, len(delta), self.work
        logits = work.replay.logits(delta[work.group], work.row, work.place, noise)
        row, token = work.row[: work.spoken], work.token[: work.spoken]
        essences = work.group[work.row[work.spoken :]]
        nll, kl, first = said(logits, token, None if self.original is None else self.original[essences])
        rows = len(work.group)
        ones = torch.ones_like(nll)
        length = torch.zeros(rows, device=nll.device).index_add(0, row, ones)
        per_row = torch.zeros(rows, device=nll.device).index_add(0, row, nll) / length.clamp(min=1)
        speaks = (~work.essence).float()
        count = torch.zeros(u, device=nll.device).index_add(0, work.group, speaks)
        loss = torch.zeros(u, device=nll.device).index_add(0, work.group, per_row) / count.clamp(min=1)
        if len(essences):
            if self.original is None:
                self.original = first.new_empty(u, first.shape[1]).index_copy(0, essences, first)
            loss = loss.index_add(0, essences, s.kl_weight * kl)
        if self.others is not None:
            coupling, members = self.others
            loss = loss + coupling.loss(delta.unflatten(1, (self.parts, -1))[:, 0], members)
        penalty = s.length_penalty / self.reference + s.weight_decay / self.reference**2
        loss = loss + (penalty * self._lengths(delta)).sum(1)
        moving = active & (loss.detach() >= s.stop_loss)
        if s.finished is not None:
            moving &= ~s.finished(logits[: work.spoken].detach(), token, work.group[row], u)
        return loss, moving

    def _noise(self) -> Tensor | None:
        """Noise of this step, ``[rows, width, d_model]``; none on bare prompts and essences."""
        if not self.settings.noise:
            return None
        step, work = int(self.steps.max()), self.work
        place = torch.arange(work.replay.rows.input_ids.shape[1], device=work.context.device)
        index = work.context[:, None] * 7919 + place[None, :] * 3571 + step * 104729  # primes: no two alike soon
        noise = self.settings.noise * self.bank[index % len(self.bank)]
        return noise * (work.context > 0)[:, None, None]

    def _compact(self, moving: Tensor) -> None:
        """Drop the rows of finished groups, once there are enough of them."""
        self.active = moving
        keep = moving[self.work.group]
        if float(keep.float().mean()) <= _COMPACT:
            self.work, self.recorded = self.work.keep(keep), None


def _slope(loss: Tensor, moving: Tensor, delta: Tensor) -> Tensor:
    """Gradient of the sum of the losses of the groups that go on, ``[u, parts * d_model]``."""
    return torch.autograd.grad(loss, delta, moving.to(loss))[0]
