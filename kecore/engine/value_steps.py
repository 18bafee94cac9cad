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
from kecore.engine.graphs import Function, record
from kecore.engine.replay import Replay
from kecore.engine.value_rows import LossRows, Row
from kecore.model import ModelView
from kecore.text import Encoder

__all__ = [
    "Coupling",
    "Finished",
    "MemberCoupling",
    "ValueBatch",
    "ValueSettings",
    "all_most_probable",
    "most_probable_in_contexts",
    "said",
]

_BETAS = (0.9, 0.999)  # of Adam
_EPS = 1e-8
_MOMENTUM = 0.5  # of gradient descent
_FLOOR = 0.1  # what its steps shrink to
_COMPACT = 0.75  # rows are gathered anew once a quarter of them belongs to groups that have finished
_RECORDED = ("cuda",)  # devices whose steps can be replayed

Finished = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""``finished(logits [k, vocab], token [k], group [k], context [k], u)`` to ``[u]``, true for each of ``u`` groups that
may end; of the logits that predict the tokens of targets, each behind a context (0: none). It may not wait for the
device: a step can be recorded."""


def all_most_probable(logits: Tensor, token: Tensor, group: Tensor, context: Tensor, u: int) -> Tensor:
    """Return the groups whose targets' tokens are the most probable ones in all contexts: a :data:`Finished`.

    ENCORE's early stop (arXiv 2502.01636, section 4).
    """
    del context
    return _none_of(logits.argmax(-1) != token, group, u)


def most_probable_in_contexts(logits: Tensor, token: Tensor, group: Tensor, context: Tensor, u: int) -> Tensor:
    """Return the same, where the bare prompt is not asked: a :data:`Finished`, as ENCORE's released code has it."""
    return _none_of((logits.argmax(-1) != token) & (context > 0), group, u)


def _none_of(missed: Tensor, group: Tensor, u: int) -> Tensor:
    """Return the groups none of whose tokens was missed, ``[u]``; of ``missed [k]`` and ``group [k]``."""
    return torch.zeros(u, dtype=torch.long, device=missed.device).index_add(0, group, missed.long()) == 0


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
        relative_to: whose norm ``‖h‖`` is: of the layer's ``"hidden"`` state (MEMIT's code), or of what the value
            ``"projection"`` gives (ROME's).
        kl_weight: factor of KL(edited ‖ original) on ``"<subject> is a"``.
        kl_position: where in that text the term reads the next token: at the ``"last"`` token (the papers' wording),
            or at the ``"subject"``'s last one (the released code of both).
        stop_loss: a group whose whole loss is below this is finished.
        finished: a further reason to finish a group; None for none.
        hits: evaluations at which ``finished`` must have held before a group is.
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
    relative_to: Literal["hidden", "projection"] = "hidden"
    kl_weight: float = 0.0625
    kl_position: Literal["last", "subject"] = "last"
    stop_loss: float = 1e-2
    finished: Finished | None = None
    hits: int = 1
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
class MemberCoupling:
    """The coupling of a micro-batch, whose groups are some of all.

    Args:
        coupling: the term of the loss.
        members: ``[b]``, the index of each of the micro-batch's groups among all.
    """

    coupling: Coupling
    members: Tensor

    def loss(self, delta: Tensor) -> Tensor:
        """Return the term of the micro-batch's groups, ``[b]``; see :meth:`Coupling.loss`."""
        return self.coupling.loss(delta, self.members)

    def keep(self, delta: Tensor) -> None:
        """Hand over the finished values ``[b, d_model]``."""
        self.coupling.keep(delta, self.members)


def said(logits: Tensor, token: Tensor, original: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return how unlikely logits make targets, and how far they are from what the unedited model said.

    Args:
        logits: ``[k, vocab]``, those of targets first.
        token: ``[t]``, the target tokens.
        original: ``[k - t, vocab]`` log-probabilities that the logits behind the targets' are compared with; None
            compares them with themselves.

    Returns:
        Negative log-likelihoods ``[t]``, KL(now ‖ original) ``[k - t]`` in nats, both differentiable once, and the
        log-probabilities ``[k - t, vocab]`` that were compared, which are not.
    """
    return _Said.apply(logits, token, original)  # type: ignore[no-any-return]


class _Said(torch.autograd.Function):
    """:func:`said` in one buffer: logits are the widest tensors here, and autograd would make eight of them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, token: Tensor, original: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_probs = logits.log_softmax(-1, dtype=torch.float32)  # [k, vocab]
        of_targets, compared = log_probs[: len(token)], log_probs[len(token) :]
        nll = -of_targets.gather(1, token[:, None]).flatten()  # [t]
        log_ratio = torch.zeros_like(compared) if original is None else compared - original
        kl = (compared.exp() * log_ratio).sum(-1)  # [k - t]
        compared_copy = compared.clone()  # the backward pass writes into the buffer
        ctx.log_probs, ctx.token, ctx.dtype = log_probs, token, logits.dtype
        ctx.centred_log_ratio = log_ratio.sub_(kl[:, None])  # [k - t, vocab]
        ctx.mark_non_differentiable(compared_copy)
        return nll, kl, compared_copy

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, nll_slope: Tensor, kl_slope: Tensor, _compared_slope: Tensor
    ) -> tuple[Tensor, None, None]:
        # d nll / d logits = p - onehot, d kl / d logits = p (log p - log q - kl).
        grad, token = ctx.log_probs.exp_(), ctx.token  # [k, vocab], [t]
        grad[: len(token)].mul_(nll_slope[:, None])
        grad[: len(token)].scatter_add_(1, token[:, None], -nll_slope[:, None])
        grad[len(token) :].mul_(ctx.centred_log_ratio).mul_(kl_slope[:, None])
        return grad.to(ctx.dtype), None, None


class ValueBatch:
    """The optimisation of some groups, advanced step by step.

    Args:
        view: the model, frozen by the caller.
        encoder: for padding.
        rows: the texts of all groups, those with a target first.
        layer: layer whose value projection's output is changed.
        settings: numbers of the optimisation.
        mode: how to drive the model, where that is known; see :class:`Replay`.
        bank: ``[n, d_model]``, vectors of noise to choose from; empty without noise.
        coupling: a further term of the loss; None for none.

    Attributes:
        mode: how the model is driven.
        delta: ``[u, parts * d_model]``, the vectors of ``u`` groups as they are now.
        reference: ``[u, parts]``, the norms that they are relative to.
        loss: ``[u]``, the last loss of each group.
        steps: ``[u]``, evaluations of the loss.
        recording: steps are to be replayed as CUDA graphs, and that has not failed.
    """

    def __init__(
        self,
        view: ModelView,
        encoder: Encoder,
        rows: Sequence[Row],
        layer: int,
        settings: ValueSettings,
        mode: str | None,
        bank: Tensor,
        coupling: MemberCoupling | None = None,
    ) -> None:
        self.settings, self.bank, self.coupling = settings, bank, coupling
        device = view.device
        replay = Replay(
            view,
            encoder,
            ids=[row.ids for row in rows],
            lookups=[row.located.lookup for row in rows],
            layer=layer,
            mode=mode,
            mixer=None if settings.beside is None else settings.beside(view, layer),
            opening=[row.context for row in rows],
        )
        self.mode, self.parts = replay.mode, replay.parts
        self.rows = LossRows.of(rows, replay, device)
        first_rows: dict[int, int] = {}  # of each group: its first request's bare prompt
        for index, row in enumerate(rows):
            first_rows.setdefault(row.group, index)
        count = len(first_rows)
        bare_prompts = torch.tensor([first_rows[group] for group in range(count)], device=device)  # [u]
        self.reference = replay.lookup_norm(bare_prompts, of_projection=settings.relative_to == "projection")
        self.delta = torch.zeros(count, self.parts * view.width, device=device)
        # Adam's moments; of gradient descent, `first` is the momentum.
        self.first, self.second = torch.zeros_like(self.delta), torch.zeros_like(self.delta)
        self.loss = torch.full((count,), float("nan"), device=device)
        self.steps = torch.zeros(count, dtype=torch.long, device=device)
        self.active = torch.ones(count, dtype=torch.bool, device=device)  # [u], groups that are not finished
        self.hits = torch.zeros(
            count, dtype=torch.long, device=device
        )  # [u], evaluations that might have been the last
        self.original: Tensor | None = None  # [u, vocab], log-probabilities behind each group's row of the KL term
        self.recording = settings.graphs and device.type in _RECORDED and coupling is None
        self.recorded: Function | None = None  # a step of the rows at hand

    def step(self, *, last: bool) -> bool:
        """Evaluate the loss and, unless ``last``, update the groups that are not finished.

        Returns:
            Whether a further step is due.
        """
        loss, moving, self.hits, compute_gradient = self._evaluate(last)
        if not bool(torch.isfinite(loss[self.active]).all()):
            raise NonFiniteError("the loss of a target value became NaN or infinite; lower the learning rate")
        self.loss = torch.where(self.active, loss, self.loss)
        self.steps += self.active
        if last or not bool(moving.any()):
            return False
        step = int(self.steps.max())
        if self.settings.optimizer == "adam":
            update = self._adam(compute_gradient(), step)
        else:
            update = self._descent(compute_gradient(), step)
        moved = self.delta - update  # [u, parts * d_model]
        clamping = (self.settings.clamp * self.reference / self._lengths(moved)).clamp(max=1.0)  # [u, parts]
        self.delta = torch.where(moving[:, None], self._scaled(moved, clamping), self.delta)
        self._compact(moving)
        return True

    def _evaluate(self, last: bool) -> tuple[Tensor, Tensor, Tensor, Callable[[], Tensor]]:
        """Return the loss of each group ``[u]``, which groups go on ``[u]``, hits ``[u]``, and what gives the gradient.

        A step is recorded once the first one has been done, which found out what later steps read.
        """
        noise = self._noise()
        inputs = [self.delta, self.active, self.hits]
        if noise is not None:
            inputs.append(noise)
        if self.recording and self.recorded is None and bool(self.steps.any()) and not last:
            try:
                self.recorded = record(self._whole, inputs)
            except RuntimeError as error:
                self.recording = False
                warnings.warn(f"steps are not replayed as CUDA graphs: {error}", KecoreWarning, stacklevel=4)
        if self.recorded is not None:
            loss, moving, hits, gradient = self.recorded(*inputs)
            return loss, moving, hits, lambda: gradient
        delta = self.delta.clone().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            loss, moving, hits = self._loss(delta, self.active, self.hits, noise)
        return loss.detach(), moving, hits, lambda: _slope(loss, moving, delta)

    def _whole(
        self, delta: Tensor, active: Tensor, hits: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the loss of each group, which of them go on, their hits, and the gradient of those that go on."""
        delta = delta.detach().requires_grad_()
        loss, moving, hits = self._loss(delta, active, hits, noise)
        return loss.detach(), moving, hits, _slope(loss, moving, delta)

    # Groups that have stopped keep their vector whatever these return, so neither masks its sums.

    def _adam(self, gradient: Tensor, step: int) -> Tensor:
        self.first = _BETAS[0] * self.first + (1 - _BETAS[0]) * gradient
        self.second = _BETAS[1] * self.second + (1 - _BETAS[1]) * gradient**2
        root = (self.second / (1 - _BETAS[1] ** step)).sqrt() + _EPS
        return self.settings.learning_rate * (self.first / (1 - _BETAS[0] ** step)) / root

    def _descent(self, gradient: Tensor, step: int) -> Tensor:
        direction = gradient / gradient.norm(dim=1, keepdim=True).clamp(min=torch.finfo(gradient.dtype).tiny)
        self.first = _MOMENTUM * self.first + direction
        half_cosine = 0.5 * (1 + math.cos(math.pi * step / self.settings.steps))
        decay = _FLOOR + (1 - _FLOOR) * half_cosine
        return self._scaled(self.first, self.settings.learning_rate * decay * self.reference)

    def _lengths(self, vectors: Tensor) -> Tensor:
        """Return the norms ``[u, parts]`` of vectors ``[u, parts * d_model]``."""
        return vectors.unflatten(1, (self.parts, -1)).norm(dim=2)

    def _scaled(self, vectors: Tensor, factor: Tensor) -> Tensor:
        """Return vectors ``[u, parts * d_model]``, each part times its factor ``[u, parts]``."""
        return (vectors.unflatten(1, (self.parts, -1)) * factor[:, :, None]).flatten(1)

    def _loss(self, delta: Tensor, active: Tensor, hits: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss of each group ``[u]``, which of the active ones go on ``[u]``, and their hits ``[u]``.

        The loss of a group whose rows are gone is its penalty alone.
        """
        settings, groups, rows = self.settings, len(delta), self.rows
        logits = rows.replay.logits(delta[rows.group], rows.row, rows.place, noise)  # [k, vocab]
        target_row, token = rows.row[: rows.targets], rows.token[: rows.targets]  # [t] each
        kl_group = rows.group[rows.row[rows.targets :]]  # [k - t]
        nll, kl, log_probs = said(logits, token, None if self.original is None else self.original[kl_group])
        # The mean over a target's tokens, then over the group's rows that have a target.
        zero_rows, zero_groups = nll.new_zeros(len(rows.group)), nll.new_zeros(groups)
        target_length = zero_rows.index_add(0, target_row, torch.ones_like(nll))  # [rows]
        row_loss = zero_rows.index_add(0, target_row, nll) / target_length.clamp(min=1)  # [rows]
        row_count = zero_groups.index_add(0, rows.group, (~rows.is_kl).float())  # [u]
        loss = zero_groups.index_add(0, rows.group, row_loss) / row_count.clamp(min=1)  # [u]
        if len(kl_group):
            if self.original is None:  # the first step, at which delta is zero
                self.original = log_probs.new_empty(groups, log_probs.shape[1]).index_copy(0, kl_group, log_probs)
            loss = loss.index_add(0, kl_group, settings.kl_weight * kl)
        if self.coupling is not None:
            values = delta.unflatten(1, (self.parts, -1))[:, 0]  # [u, d_model], without the mixer's vectors
            loss = loss + self.coupling.loss(values)
        penalty = settings.length_penalty / self.reference + settings.weight_decay / self.reference**2  # [u, parts]
        loss = loss + (penalty * self._lengths(delta)).sum(1)
        moving = active & (loss.detach() >= settings.stop_loss)
        if settings.finished is not None:
            target_group = rows.group[target_row]  # [t]
            context = rows.context[target_row]  # [t]
            hits = hits + settings.finished(logits[: rows.targets].detach(), token, target_group, context, groups)
            moving = moving & (hits < settings.hits)
        return loss, moving, hits

    def _noise(self) -> Tensor | None:
        """Return the noise of this step, ``[rows, width, d_model]``; zero on bare prompts and rows of the KL term."""
        if not self.settings.noise:
            return None
        step, context = int(self.steps.max()), self.rows.context
        column = torch.arange(self.rows.replay.rows.input_ids.shape[1], device=context.device)
        # Primes, so that no two places soon draw the same vector: [rows, width].
        index = context[:, None] * 7919 + column[None, :] * 3571 + step * 104729
        noise = self.settings.noise * self.bank[index % len(self.bank)]  # [rows, width, d_model]
        return noise * (context > 0)[:, None, None]

    def _compact(self, moving: Tensor) -> None:
        """Drop the rows of finished groups, once there are enough of them."""
        self.active = moving
        is_used = moving[self.rows.group]  # [rows]
        if float(is_used.float().mean()) <= _COMPACT:
            self.rows, self.recorded = self.rows.select(is_used), None


def _slope(loss: Tensor, moving: Tensor, delta: Tensor) -> Tensor:
    """Return the gradient of the sum of the losses of the groups that go on, ``[u, parts * d_model]``."""
    return torch.autograd.grad(loss, delta, moving.to(loss))[0]
