"""The three runs of causal tracing on one prompt; :mod:`kecore_analysis.trace` says what they are compared for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kecore.api.progress import Progress, silent
from kecore.model import ModelView
from kecore.model.mixer import mixer
from kecore.model.sites import ModuleOutput, Output, Patch, Site, Start
from kecore.text import Encoder, Rows
from kecore_analysis.trace import KINDS, Known, Trace

__all__ = ["Tracer"]


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
        self._modules = {kind: _state_modules(view, kind) for kind in self.kinds}

    @staticmethod
    def spread_of(view: ModelView, encoder: Encoder, prompts: Sequence[Known]) -> float:
        """Return the standard deviation of the embeddings of all subjects' tokens: the unit of the noise."""
        ids: list[int] = []
        for known in prompts:
            ids += _locate(encoder, known).subject_ids
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
        prompt = _locate(self.encoder, known)
        layers = len(self.view.layers)
        done, total = 0, len(self.kinds) * layers
        restored: dict[str, Tensor] = {}
        with self.view.frozen():
            clean = self._run_clean(prompt)
            corrupted = self._run_corrupted(prompt, clean.answer)
            for kind in self.kinds:
                # Before the subject nothing is corrupted, so restoring it changes nothing.
                table = torch.full((len(prompt.ids), layers), corrupted.probability)  # [tokens, layers]
                for layer in range(layers):
                    table[prompt.first :, layer] = self._run_restored(prompt, clean, corrupted, kind, layer)
                    done += 1
                    progress("trace", done, total)
                restored[kind] = table
        decode = self.encoder.tokenizer.decode
        return Trace(
            tokens=tuple(decode([token]) for token in prompt.ids),
            subject=(prompt.first, prompt.last),
            answer=decode([clean.answer]),
            clean=clean.probability,
            corrupted=corrupted.probability,
            restored=restored,
        )

    def _rows(self, prompt: _Prompt, count: int) -> Rows:
        return self.encoder.rows([prompt.ids] * count).to(self.view.device)

    def _run_clean(self, prompt: _Prompt) -> _CleanRun:
        """Run the prompt as it is, and keep every state that may be restored."""
        states: dict[str, dict[int, Tensor]] = {kind: {} for kind in self.kinds}

        def keep(kind: str, layer: int) -> Patch:
            def change(state: Tensor) -> Tensor:
                states[kind][layer] = state[0].clone()  # [tokens, d_model] of the only row
                return state

            return change

        patches: dict[Site, Patch] = {}
        for kind, modules in self._modules.items():
            for layer, module in enumerate(modules):
                patches[ModuleOutput(module)] = keep(kind, layer)
        at = _last_token(1, len(prompt.ids), self.view.device)
        logits = self.view.run(self._rows(prompt, 1), patches=patches, at=at).logits  # [1, vocab]
        answer = int(logits[0].argmax())
        return _CleanRun(answer, float(_probability(logits, answer)), states)

    def _noise(self, prompt: _Prompt) -> Tensor:
        """Draw the noise ``[samples, subject tokens, d_model]``, the same for all subjects of one length.

        So all states of a prompt are compared under the same noise.
        """
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.samples, prompt.last - prompt.first + 1, self.view.width)
        return self.deviation * torch.randn(shape, generator=generator)

    def _corruption(self, prompt: _Prompt, count: int) -> dict[Site, Patch]:
        """Return what adds the noise to ``count`` rows: row ``r`` of the pass gets sample ``r mod samples``."""
        noise = self._noise(prompt)

        def change(embedded: Tensor) -> Tensor:
            added = noise.to(embedded).repeat(count // self.samples, 1, 1)  # [rows, subject tokens, d_model]
            out = embedded.clone()
            out[:, prompt.first : prompt.last + 1] += added
            return out

        return {ModuleOutput(self.view.model.get_input_embeddings()): change}  # type: ignore[operator, union-attr]

    def _run_corrupted(self, prompt: _Prompt, answer: int) -> _CorruptedRun:
        """Run the prompt with noise, a row for each sample."""
        layers = range(len(self.view.layers))
        out = self.view.run(
            self._rows(prompt, self.samples),
            taps=map(Output, layers),
            patches=self._corruption(prompt, self.samples),
            at=_last_token(self.samples, len(prompt.ids), self.view.device),
        )
        hidden = {layer: out[Output(layer)] for layer in layers}
        return _CorruptedRun(float(_probability(out.logits, answer).mean()), hidden)

    def _run_restored(
        self, prompt: _Prompt, clean: _CleanRun, corrupted: _CorruptedRun, kind: str, layer: int
    ) -> Tensor:
        """Restore a kind's state at a layer, at each token from the subject's first on in turn.

        Returns:
            The answer's probability with that token's state restored, mean over noise samples, ``[tokens]``.
        """
        window = _window(layer, 1 if kind == "hidden" else self.window, len(self.view.layers))
        lowest = window[0]
        samples = self.samples
        chunk_size = max(1, self.tokens // (len(prompt.ids) * samples))  # tokens that are restored in one pass
        probabilities: list[Tensor] = []
        for start in range(prompt.first, len(prompt.ids), chunk_size):
            chunk = torch.arange(start, min(start + chunk_size, len(prompt.ids)), device=self.view.device)
            # Rows: for each token of the chunk one of each noise sample.
            count = len(chunk) * samples
            row = torch.arange(count, device=self.view.device)  # [rows]
            column = chunk.repeat_interleave(samples)  # [rows]: the token that is restored in each
            patches = self._corruption(prompt, count)
            for index in window:
                patches[ModuleOutput(self._modules[kind][index])] = _restoring(clean.states[kind][index], row, column)
            begin: Start | None = None
            if lowest > 0:  # the layers below compute what they did in the corrupted run
                begin = Start(lowest, corrupted.hidden[lowest - 1].repeat(len(chunk), 1, 1))
            out = self.view.run(
                self._rows(prompt, count),
                patches=patches,
                first=begin,
                at=_last_token(count, len(prompt.ids), self.view.device),
            )
            by_token = _probability(out.logits, clean.answer).view(len(chunk), samples)  # [tokens, samples]
            probabilities.append(by_token.mean(1).cpu())
        return torch.cat(probabilities)


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt as tokens.

    Args:
        ids: its tokens.
        first: index of the subject's first token.
        last: index of the subject's last token.
    """

    ids: list[int]
    first: int
    last: int

    @property
    def subject_ids(self) -> list[int]:
        """The subject's tokens."""
        return self.ids[self.first : self.last + 1]


@dataclass(frozen=True, slots=True)
class _CleanRun:
    """The prompt without noise.

    Args:
        answer: the most likely next token.
        probability: its probability.
        states: by kind and layer ``[tokens, d_model]``.
    """

    answer: int
    probability: float
    states: Mapping[str, Mapping[int, Tensor]]


@dataclass(frozen=True, slots=True)
class _CorruptedRun:
    """The prompt with noise.

    Args:
        probability: of the clean run's answer, mean over noise samples.
        hidden: output of each layer, ``[samples, tokens, d_model]``.
    """

    probability: float
    hidden: Mapping[int, Tensor]


def _probability(logits: Tensor, answer: int) -> Tensor:
    """Return the probability of a token in each row of ``logits``, ``[rows]``."""
    return logits.float().softmax(-1)[:, answer]


def _restoring(clean: Tensor, row: Tensor, column: Tensor) -> Patch:
    """Return what puts clean states ``[tokens, d_model]`` into some rows, one token each."""

    def change(state: Tensor) -> Tensor:
        out = state.clone()
        out[row, column] = clean[column].to(out)
        return out

    return change


def _locate(encoder: Encoder, known: Known) -> _Prompt:
    """Tokenise a prompt, and find the subject's tokens."""
    encoded = encoder.encode(known.prompt)
    start = known.span[0] + encoded.shift
    first = next(index for index, (_, end) in enumerate(encoded.spans) if end > start)
    return _Prompt(list(encoded.ids), first, encoded.last_token_of(known.span))


def _state_modules(view: ModelView, kind: str) -> list[nn.Module]:
    """Return the modules whose outputs are a kind's states, by layer."""
    if kind == "hidden":
        return [layer.module for layer in view.layers]
    if kind == "mlp":
        return [layer.block.module for layer in view.layers]
    return [mixer(view, layer.index) for layer in view.layers]


def _window(layer: int, size: int, count: int) -> range:
    """Return ``size`` layers centred at one, cut at both ends of the stack of ``count``."""
    first = layer - size // 2
    return range(max(0, first), min(count, first + size))


def _last_token(rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return row and column of the last token of each row, ``[rows]`` both."""
    return torch.arange(rows, device=device), torch.full((rows,), width - 1, device=device)
