"""Causal tracing: which hidden states carry a fact (Meng et al., ROME, section 2, arXiv 2202.05262).

Three runs of a prompt are compared. The *clean* run gives the model's answer. In the *corrupted* run noise is added to
the embeddings of the subject's tokens, so that the answer becomes unlikely. The *corrupted run with restoration* is
the corrupted run in which one state is set back to what it was in the clean run. How much likelier the answer is in it
than in the corrupted run is the state's indirect effect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kecore.api.errors import RequestError
from kecore.api.progress import Progress, silent
from kecore.model import ModelView
from kecore.model.mixer import mixer
from kecore.model.sites import ModuleOutput, Output, Patch, Site, Start
from kecore.text import Encoder, Rows

__all__ = ["KINDS", "ROLES", "Averages", "Known", "Trace", "Tracer", "average", "suggested_layers"]

KINDS = ("hidden", "mlp", "attention")
"""What can be restored: a layer's output, or what its feed-forward block or its attention adds to the stream."""

ROLES = (
    "first subject token", "middle subject tokens", "last subject token", "first later token", "further tokens",
    "last token",
)  # fmt: skip
"""The rows of averages over prompts of different lengths, as in the paper's figure 2."""

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
        """The subject's last occurrence in a prompt.

        Raises:
            RequestError: the subject is empty or not in the prompt.
        """
        start = prompt.rfind(subject)
        if not subject or start < 0:
            raise RequestError(f"the subject {subject!r} is not in the prompt {prompt!r}")
        return cls(prompt, (start, start + len(subject)))


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """What restoring each state of one prompt does.

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
        """Indirect effect of each state, ``[tokens, layers]``."""
        return self.restored[kind] - self.corrupted

    def roles(self) -> list[int]:
        """Index into :data:`ROLES` of each token from the subject's first on; -1 for those before it."""
        first, last = self.subject
        top = len(self.tokens) - 1
        found: list[int] = []
        for place in range(len(self.tokens)):
            if place < first:
                found.append(-1)
            elif place <= last:
                found.append(2 if place == last else 0 if place == first else 1)
            else:
                found.append(5 if place == top else 3 if place == last + 1 else 4)
        return found


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


class Tracer:
    """Traces prompts on one model.

    Args:
        view: the model.
        encoder: its tokenizer.
        noise: standard deviation of the noise, in units of ``spread``.
        spread: standard deviation of the embeddings; see :meth:`spread_of`.
        samples: noise samples a prompt.
        window: layers, centred at each one, whose feed-forward blocks or attentions are restored together.
        kinds: of :data:`KINDS`.
        seed: seeds the noise.
        tokens: tokens of one micro-batch, at the most.

    Raises:
        UnsupportedModelError: ``attention`` is asked for, and no module adds it to the residual stream as it is.
    """

    def __init__(
        self,
        view: ModelView,
        encoder: Encoder,
        *,
        spread: float,
        noise: float = 3.0,
        samples: int = 10,
        window: int = 10,
        kinds: Sequence[str] = KINDS,
        seed: int = 0,
        tokens: int = 2048,
    ) -> None:
        self.view, self.encoder = view, encoder
        self.deviation, self.samples, self.window = noise * spread, samples, window
        self.seed, self.tokens = seed, tokens
        self.kinds = tuple(kinds)
        self._modules = {kind: _sites(view, kind) for kind in self.kinds}

    @staticmethod
    def spread_of(view: ModelView, encoder: Encoder, prompts: Sequence[Known]) -> float:
        """Standard deviation of the embeddings of all subjects' tokens: the unit of the noise."""
        ids = [token for known in prompts for token in _located(encoder, known)[2]]
        embedding: Any = view.model.get_input_embeddings()  # type: ignore[operator, union-attr]
        with view.frozen(), torch.no_grad():
            return float(embedding(torch.tensor(ids, device=view.device)).float().std())

    @torch.no_grad()
    def trace(self, known: Known, progress: Progress = silent) -> Trace:
        """Restore every state of one prompt in turn.

        Raises:
            TokenizerError: the tokenizer drops the subject.
            PromptTooLongError: the prompt does not fit the model's context.
        """
        ids, (first, last), _ = _located(self.encoder, known)
        width = len(ids)
        with self.view.frozen():
            clean, answer, states = self._clean(ids)
            below, corrupted = self._corrupted(ids, first, last, answer)
            restored: dict[str, Tensor] = {}
            total = len(self.kinds) * len(self.view.layers)
            for place, kind in enumerate(self.kinds):
                # Before the subject nothing is corrupted, so restoring it changes nothing.
                table = torch.full((width, len(self.view.layers)), corrupted)
                for layer in range(len(self.view.layers)):
                    rows = self._restored(ids, (first, last), answer, kind, layer, states[kind], below)
                    table[first:, layer] = rows
                    progress("trace", place * len(self.view.layers) + layer + 1, total)
                restored[kind] = table
        decode = self.encoder.tokenizer.decode
        return Trace(
            tokens=tuple(decode([token]) for token in ids),
            subject=(first, last),
            answer=decode([answer]),
            clean=clean,
            corrupted=corrupted,
            restored=restored,
        )

    def _rows(self, ids: Sequence[int], count: int) -> Rows:
        return self.encoder.rows([ids] * count).to(self.view.device)

    def _probability(self, logits: Tensor, answer: int) -> Tensor:
        return logits.float().softmax(-1)[:, answer]

    def _clean(self, ids: Sequence[int]) -> tuple[float, int, dict[str, dict[int, Tensor]]]:
        states: dict[str, dict[int, Tensor]] = {kind: {} for kind in self.kinds}

        def keep(kind: str, layer: int) -> Callable[[Tensor], Tensor]:
            def change(state: Tensor) -> Tensor:
                states[kind][layer] = state[0].clone()
                return state

            return change

        patches: dict[Site, Patch] = {}
        for kind, modules in self._modules.items():
            patches |= {ModuleOutput(module): keep(kind, layer) for layer, module in enumerate(modules)}
        at = _last(1, len(ids), self.view.device)
        logits = self.view.run(self._rows(ids, 1), patches=patches, at=at).logits
        answer = int(logits[0].argmax())
        return float(self._probability(logits, answer)), answer, states

    def _noise(self, first: int, last: int) -> Tensor:
        """``[samples, subject tokens, d_model]``: the same for every prompt of so many tokens, and every state."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.samples, last - first + 1, self.view.width)
        return self.deviation * torch.randn(shape, generator=generator)

    def _corruption(self, first: int, last: int, count: int) -> dict[Site, Patch]:
        """What adds the noise: row ``r`` of the pass gets sample ``r mod samples``."""
        noise = self._noise(first, last)

        def change(embedded: Tensor) -> Tensor:
            added = noise.to(embedded).repeat(count // self.samples, 1, 1)
            out = embedded.clone()
            out[:, first : last + 1] += added
            return out

        return {ModuleOutput(self.view.model.get_input_embeddings()): change}  # type: ignore[operator, union-attr]

    def _corrupted(self, ids: Sequence[int], first: int, last: int, answer: int) -> tuple[dict[int, Tensor], float]:
        layers = range(len(self.view.layers))
        out = self.view.run(
            self._rows(ids, self.samples),
            taps=map(Output, layers),
            patches=self._corruption(first, last, self.samples),
            at=_last(self.samples, len(ids), self.view.device),
        )
        hidden = {layer: out[Output(layer)] for layer in layers}
        return hidden, float(self._probability(out.logits, answer).mean())

    def _restored(
        self,
        ids: Sequence[int],
        subject: tuple[int, int],
        answer: int,
        kind: str,
        layer: int,
        states: Mapping[int, Tensor],
        below: Mapping[int, Tensor],
    ) -> Tensor:
        """Probability of the answer with a state of each token from the subject's first on restored, ``[tokens]``."""
        window = _window(layer, 1 if kind == "hidden" else self.window, len(self.view.layers))
        lowest = window[0]
        width, samples = len(ids), self.samples
        places = list(range(subject[0], width))
        size = max(1, self.tokens // (width * samples))
        found: list[Tensor] = []
        for part in (places[i : i + size] for i in range(0, len(places), size)):
            count = len(part) * samples
            row = torch.arange(count, device=self.view.device)
            column = torch.tensor(part, device=self.view.device).repeat_interleave(samples)
            patches = self._corruption(*subject, count)
            for index in window:
                patches[ModuleOutput(self._modules[kind][index])] = _restoring(states[index], row, column)
            out = self.view.run(
                self._rows(ids, count),
                patches=patches,
                # The layers below compute what they did in the corrupted run.
                first=Start(lowest, below[lowest - 1].repeat(len(part), 1, 1)) if lowest else None,
                at=_last(count, width, self.view.device),
            )
            found.append(self._probability(out.logits, answer).view(len(part), samples).mean(1).cpu())
        return torch.cat(found)


def _restoring(clean: Tensor, row: Tensor, column: Tensor) -> Callable[[Tensor], Tensor]:
    def change(state: Tensor) -> Tensor:
        out = state.clone()
        out[row, column] = clean[column].to(out)
        return out

    return change


def _located(encoder: Encoder, known: Known) -> tuple[list[int], tuple[int, int], list[int]]:
    """A prompt's tokens, the subject's first and last, and the subject's tokens."""
    item = encoder.encode(known.prompt)
    last = item.last_token_of(known.span)
    start = known.span[0] + item.shift
    first = next(place for place, (_, end) in enumerate(item.spans) if end > start)
    return list(item.ids), (first, last), list(item.ids[first : last + 1])


def _sites(view: ModelView, kind: str) -> list[nn.Module]:
    """The modules whose outputs are a kind's states, by layer."""
    if kind == "hidden":
        return [layer.module for layer in view.layers]
    if kind == "mlp":
        return [layer.site.linear.module for layer in view.layers]
    return [mixer(view, layer.index) for layer in view.layers]


def _window(layer: int, size: int, count: int) -> range:
    """``size`` layers centred at one, cut at both ends of the stack."""
    return range(max(0, layer - size // 2), min(count, layer - size // 2 + size))


def _last(rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.arange(rows, device=device), torch.full((rows,), width - 1, device=device)


def average(traces: Sequence[Trace]) -> Averages:
    """Average indirect effects by the tokens' roles: each prompt's tokens of a role count together once.

    Raises:
        RequestError: there are no traces.
    """
    if not traces:
        raise RequestError("no prompts were traced; give at least one")
    effects: dict[str, Tensor] = {}
    for kind in traces[0].restored:
        rows: list[Tensor] = []
        for role in range(len(ROLES)):
            found = [
                trace.effect(kind)[[place for place, own in enumerate(trace.roles()) if own == role]].mean(0)
                for trace in traces
                if role in trace.roles()
            ]
            layers = traces[0].restored[kind].shape[1]
            rows.append(torch.stack(found).mean(0) if found else torch.full((layers,), torch.nan))
        effects[kind] = torch.stack(rows)
    return Averages(
        count=len(traces),
        clean=sum(trace.clean for trace in traces) / len(traces),
        corrupted=sum(trace.corrupted for trace in traces) / len(traces),
        effects=effects,
    )


def suggested_layers(averages: Averages) -> tuple[int, tuple[int, ...]]:
    """Where to edit: the layer at which restored feed-forward blocks bring most back at a token of the subject.

    That is the last one on average (section 2.2), but for single prompts it may be an earlier one.

    Returns:
        That layer, for methods that edit one, and the layers around it that bring nearly as much, for those that
        spread an edit.

    Raises:
        RequestError: feed-forward blocks were not traced.
    """
    if "mlp" not in averages.effects:
        raise RequestError("layers are suggested by the effects of feed-forward blocks; trace the kind 'mlp'")
    table = averages.effects["mlp"][: ROLES.index("last subject token") + 1].nan_to_num(-torch.inf)
    effect = table[table.max(1).values.argmax()]
    best = int(effect.argmax())
    low = high = best
    while low > 0 and float(effect[low - 1]) >= _NEAR * float(effect[best]):
        low -= 1
    while high + 1 < len(effect) and float(effect[high + 1]) >= _NEAR * float(effect[best]):
        high += 1
    return best, tuple(range(low, high + 1))
