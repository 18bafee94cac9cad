"""The published procedures, one request at a time, in plain torch: the standing baseline of vs_serial.py.

Written from the papers: ROME (arXiv 2202.05262, eq. 2 to 4), MEMIT (arXiv 2210.07229, eq. 14 to 20 and algorithm 1) and
AlphaEdit (arXiv 2410.02355, eq. 12), with the numbers that their authors publish. Each value is optimised alone, by
Adam, through the whole model with all its logits; keys are read by one pass of the whole model for each edited layer;
each layer's update is a dense solve. Nothing of :mod:`kecore.engine` is used but the context prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kecore import EditRequest, Encoder, KeyStatistics, ModelView
from kecore.model import SiteId
from kecore.text import Rows

ROWS = 128  # prompts of one pass that reads keys or hidden states


@dataclass(frozen=True)
class Published:
    """Numbers of the procedures; those of MEMIT for models of Llama's kind unless another method has its own.

    Args:
        layers: edited layers; values are optimised for the last.
        steps: evaluations of the loss.
        rate: Adam's.
        decay: factor of ``‖delta‖ / ‖h‖²``.
        clamp: largest ``‖delta‖ / ‖h‖``.
        kl: factor of the KL term.
        stop: a loss below this is small enough.
        weight: λ of MEMIT.
        threshold: eigenvalues below this span AlphaEdit's null space.
        l2: AlphaEdit's length penalty.
    """

    layers: tuple[int, ...] = (4, 5, 6, 7, 8)
    steps: int = 25
    rate: float = 0.5
    decay: float = 1e-3
    clamp: float = 4.0
    kl: float = 0.0625
    stop: float = 5e-2
    weight: float = 15000.0
    threshold: float = 2e-2
    l2: float = 10.0


PUBLISHED = {
    "memit": Published(),
    "rome": Published(layers=(5,)),
    "alphaedit": Published(rate=0.1, decay=0.5, clamp=0.75, l2=1.0),
}


@dataclass(frozen=True)
class Prompt:
    """One prompt as tokens: the subject's last token, and where the target begins."""

    ids: tuple[int, ...]
    lookup: int
    start: int


class Serial:
    """A model that is edited as the papers say.

    Args:
        view: the model; its weights are changed, see :meth:`restoring`.
        encoder: text to tokens.
        statistics: second moments.
        contexts: prefixes; the first is empty.
        settings: numbers.
    """

    def __init__(
        self,
        view: ModelView,
        encoder: Encoder,
        statistics: KeyStatistics,
        contexts: Sequence[str],
        settings: Published,
    ) -> None:
        self.view, self.encoder, self.statistics, self.contexts, self.s = view, encoder, statistics, contexts, settings

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Put the edited weights back at the end of a block."""
        kept = {i: self.view.layers[i].site.linear.parameter.data.clone() for i in self.s.layers}
        try:
            yield
        finally:
            for i, data in kept.items():
                self.view.layers[i].site.linear.parameter.data.copy_(data)

    def memit(self, requests: Sequence[EditRequest]) -> None:
        """All values, then layer by layer the least-squares update of all requests."""

        def solve(layer: int, keys: Tensor, residuals: Tensor) -> Tensor:
            moment = self.statistics.moment(SiteId(layer))
            return torch.linalg.solve(self.s.weight * moment + keys @ keys.t(), keys) @ residuals.t()

        self._spread(requests, solve)

    def alphaedit(self, requests: Sequence[EditRequest]) -> None:
        """The same with the update projected into the null space of preserved keys."""

        def solve(layer: int, keys: Tensor, residuals: Tensor) -> Tensor:
            vectors, values, _ = torch.linalg.svd(self.statistics.moment(SiteId(layer)))
            null = vectors[:, values < self.s.threshold]
            projector = null @ null.t()
            system = projector @ (keys @ keys.t()) + self.s.l2 * torch.eye(len(keys), dtype=keys.dtype)
            return torch.linalg.solve(system, projector @ keys @ residuals.t())

        self._spread(requests, solve)

    def rome(self, requests: Sequence[EditRequest]) -> None:
        """One request after another, each a rank-one update of the model as the ones before left it."""
        (layer,) = self.s.layers
        inverse = torch.linalg.inv(self.statistics.moment(SiteId(layer)))
        projection = self.view.layers[layer].site.linear
        for request in requests:
            key = self._keys([request], layer)[:, 0]
            target = self.value(request, layer)
            bare = self._prompt(request, "", target=False)
            own, now = (x[0].double() for x in self._read([bare], layer, layer))
            direction = inverse @ key
            residual = target.double() - now
            projection.weight.add_(torch.outer(residual / (own @ direction), direction).to(projection.weight))

    def _spread(self, requests: Sequence[EditRequest], solve: Callable[[int, Tensor, Tensor], Tensor]) -> None:
        last = self.s.layers[-1]
        targets = torch.stack([self.value(request, last) for request in requests]).double()
        bare = [self._prompt(request, "", target=False) for request in requests]
        for place, layer in enumerate(self.s.layers):
            keys = self._keys(requests, layer)
            now = self._read(bare, layer, last)[1].double()
            residuals = (targets - now).t() / (len(self.s.layers) - place)
            weight = self.view.layers[layer].site.linear.weight
            weight.add_(solve(layer, keys, residuals).t().to(weight))

    def value(self, request: EditRequest, layer: int) -> Tensor:
        """The hidden state behind ``layer`` that makes the model say the target, ``[d_model]``."""
        s = self.s
        prompts = [self._prompt(request, context, target=True) for context in self.contexts]
        essence = self._prompt(EditRequest("{} is a", request.subject, request.target), "", target=False)
        rows = self._rows([*prompts, essence])
        lookups = torch.tensor([p.lookup for p in (*prompts, essence)])
        delta = torch.zeros(self.view.width, requires_grad=True)
        optimiser = torch.optim.Adam([delta], lr=s.rate)
        first: list[Tensor] = []
        before = torch.empty(0)
        with torch.enable_grad():
            for step in range(s.steps):
                with _added(self.view, layer, lookups, delta, first):
                    logits = self.view.model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits
                table = logits.float().log_softmax(-1)
                now = table[-1, len(essence.ids) - 1]
                if step == 0:
                    before = now.detach()
                norm = first[0][0].norm()
                losses = [
                    -torch.stack([table[i, t - 1, p.ids[t]] for t in range(p.start, len(p.ids))]).mean()
                    for i, p in enumerate(prompts)
                ]
                divergence = nn.functional.kl_div(before, now, log_target=True, reduction="sum")
                loss = torch.stack(losses).mean() + s.kl * divergence + s.decay * delta.norm() / norm**2
                if float(loss.detach()) < s.stop or step == s.steps - 1:
                    break
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                with torch.no_grad():
                    delta *= min(1.0, float(s.clamp * norm / delta.norm()))
        return first[0][0] + delta.detach()

    def _keys(self, requests: Sequence[EditRequest], layer: int) -> Tensor:
        """Mean keys ``[d_in, n]``, the bare prompt's half."""
        columns: list[Tensor] = []
        for request in requests:
            prompts = [self._prompt(request, context, target=False) for context in self.contexts]
            keys = self._read(prompts, layer, layer)[0].double()
            columns.append((keys[0] + keys[1:].mean(0)) / 2 if len(keys) > 1 else keys[0])
        return torch.stack(columns, dim=1)

    @torch.no_grad()
    def _read(self, prompts: Sequence[Prompt], layer: int, output: int) -> tuple[Tensor, Tensor]:
        """Keys of ``layer`` and hidden states behind ``output`` at the subjects, by passes of the whole model."""
        keys: list[Tensor] = []
        states: list[Tensor] = []
        for begin in range(0, len(prompts), ROWS):
            some = prompts[begin : begin + ROWS]
            rows, lookups = self._rows(some), torch.tensor([p.lookup for p in some])
            at = torch.arange(len(some)), lookups
            handles = [
                self.view.layers[layer].site.linear.module.register_forward_pre_hook(
                    lambda _m, args, at=at: keys.append(args[0][at])
                ),
                self.view.layers[output].module.register_forward_hook(
                    lambda _m, _args, out, at=at: states.append(_tensor(out)[at])
                ),
            ]
            self.view.model(input_ids=rows.input_ids, attention_mask=rows.attention_mask)
            for handle in handles:
                handle.remove()
        return torch.cat(keys).float(), torch.cat(states).float()

    def _prompt(self, request: EditRequest, context: str, *, target: bool) -> Prompt:
        text = f"{context}. {request.text}" if context else request.text
        shift = len(text) - len(request.text)
        begin, end = request.subject_span
        encoded = self.encoder.encode(text, request.target if target else "")
        return Prompt(encoded.ids, encoded.last_token_of((begin + shift, end + shift)), encoded.start)

    def _rows(self, prompts: Sequence[Prompt]) -> Rows:
        return self.encoder.rows([p.ids for p in prompts])


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def _added(view: ModelView, layer: int, lookups: Tensor, delta: Tensor, first: list[Tensor]) -> Iterator[None]:
    """Add ``delta`` to a layer's output at each row's subject; the first time, keep what stood there."""

    def change(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = _tensor(output)
        at = torch.arange(len(lookups)), lookups
        if not first:
            first.append(hidden[at].detach())
        changed = hidden.index_put(at, hidden[at] + delta)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    handle = view.layers[layer].module.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()
