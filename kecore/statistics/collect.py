"""Collecting key statistics: one pass over packed tokens serves all layers and stops at the last one.

Peers run the whole model once per layer over a hundred thousand documents; here the number of tokens follows from the
key width (a small multiple is enough: arXiv 2506.04226), with a figure that tells whether it was.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kecore.api.errors import KecoreWarning, NonFiniteError
from kecore.api.identity import Fingerprint
from kecore.api.progress import Progress, silent
from kecore.corpus import Corpus, TextSample
from kecore.files import read_tensors, write_tensors
from kecore.memory import Need, cast_bytes, forward_bytes, pass_tokens
from kecore.model import LinearView, ModelView
from kecore.ops import second_moment_
from kecore.statistics.moments import KIND, SEQUENCE, KeyStatistics, weights_below
from kecore.statistics.triangular import action_change, pack_triangle, symmetrise_, unpack_triangle
from kecore.text import Encoder, Rows

__all__ = ["TOKENS_PER_WIDTH", "collect_statistics", "collection_need", "sample_text", "token_budget"]

TOKENS_PER_WIDTH = 20
"""Tokens per column of the key; arXiv 2506.04226 finds 10 enough for Llama-2 with a ridge."""

_PARTIAL = "statistics.partial.safetensors"
_SAVE_EVERY = 20.0  # seconds between checkpoints of a long run
_CHARACTERS_PER_PASSAGE = 100  # lower bound, to size the reservoir


def token_budget(view: ModelView) -> int:
    """Tokens that estimate the second moment well enough for the model's key width."""
    return TOKENS_PER_WIDTH * max(layer.value_projection.d_in for layer in view.layers)


def sample_text(corpus: Corpus, tokens: int, seed: int = 0) -> TextSample:
    """Draw passages that hold at least ``tokens`` tokens, where the corpus has so many.

    Raises:
        DataFormatError: the corpus holds no text, or a record has no ``text``.
    """
    return corpus.sample(max(64, 8 * tokens // _CHARACTERS_PER_PASSAGE), seed)


def collect_statistics(
    view: ModelView,
    encoder: Encoder,
    text: Corpus | TextSample,
    layers: Sequence[int],
    *,
    tokens: int | None = None,
    until: float | None = None,
    seed: int = 0,
    precision: torch.dtype | None = None,
    memory: int | None = None,
    out: str | Path | None = None,
    progress: Progress = silent,
) -> KeyStatistics:
    """Collect the statistics of several layers in one pass over the text.

    Args:
        view: the unedited model.
        encoder: its tokenizer.
        text: natural text, or passages of it that :func:`sample_text` has drawn for as many tokens.
        layers: which layers.
        tokens: how many tokens; by default :func:`token_budget`. Less if the corpus is smaller.
        until: stop early, at a half, a quarter, an eighth ... of ``tokens``, once ``convergence`` is at most this
            in every layer. Warns where it never is.
        seed: seeds the choice of passages; without effect on passages that were drawn already.
        precision: run the model in this type, None for its own; sums are float64 in any case. What bfloat16 rounds
            off a key is noise that a mean over many keys hardly holds.
        memory: bytes of activations per pass; fewer tokens then run at once, down to one row.
        out: folder for the result. A run that was killed continues from its last checkpoint there and
            counts nothing twice.
        progress: called with tokens done.

    Returns:
        The statistics; memory-mapped where ``out`` is given.

    Raises:
        NonFiniteError: the keys hold NaN or infinity.
    """
    layers = sorted({view.layer(i).index for i in layers})
    wanted = tokens or token_budget(view)
    sample = text if isinstance(text, TextSample) else sample_text(text, wanted, seed)
    identity = view.identity()
    base = {i: Fingerprint.of(identity, view.dtype, weights_below(view, i)) for i in layers}
    sequence = min(SEQUENCE, view.max_length or SEQUENCE)
    name = None if precision is None else str(precision).removeprefix("torch.")
    blank = KeyStatistics(
        moments={},
        tokens=0,
        base=base,
        corpus=sample.digest,
        sources=sample.sources,
        seed=sample.seed,
        sequence=sequence,
        precision=name,
    )
    run = _Run(view, blank, layers, wanted, until, Path(out) if out is not None else None)
    rows = _packed_rows(encoder, sample.passages, blank.sequence, wanted)
    with view.frozen(), view.cast(precision):
        run.over(rows, _tokens_per_pass(view, layers, memory), progress)
    result = run.result()
    del run  # its sums are the result's moments, which are mapped from the file in a moment
    if until is not None and not max(result.convergence.values(), default=math.inf) <= until:
        warnings.warn(_unconverged(result, until), KecoreWarning, stacklevel=2)
    if out is None:
        return result
    file = result.save(out)
    (Path(out) / _PARTIAL).unlink(missing_ok=True)
    return KeyStatistics.load(file)


def collection_need(view: ModelView, layers: Sequence[int], tokens: int, precision: torch.dtype | None = None) -> Need:
    """What collecting the statistics of these layers takes in memory."""
    widths = [view.layer(i).value_projection.d_in for i in layers]
    row = min(SEQUENCE, view.max_length or SEQUENCE)
    parts = {
        "sums": sum(8 * d * d for d in widths),
        "sums at half": sum(4 * d * d for d in widths),
        "comparison": 16 * max(widths) ** 2,
        "checkpoint": sum(4 * d * d for d in widths),
    }
    parts |= cast_bytes(view, precision)
    token = forward_bytes(view) + 4 * sum(widths)
    return Need("statistics", parts, token, min(tokens, pass_tokens(view)), row)


def _tokens_per_pass(view: ModelView, layers: Sequence[int], memory: int | None) -> int:
    most = pass_tokens(view)
    return most if memory is None else collection_need(view, layers, most).micro_batch(memory)


def _unconverged(found: KeyStatistics, until: float) -> str:
    worst = max(found.convergence.values(), default=math.inf)
    return (
        f"the key statistics still change by {worst:.3g} from half of their {found.tokens:,} tokens to all of them "
        f"(asked for {until:g}); take more tokens, or more text if it was used up"
    )


class _Run:
    """Sums of a collection under way, and its checkpoints."""

    def __init__(
        self,
        view: ModelView,
        blank: KeyStatistics,
        layers: list[int],
        wanted: int,
        until: float | None,
        out: Path | None,
    ) -> None:
        self.view, self.blank, self.layers, self.wanted, self.until = view, blank, layers, wanted, until
        self.partial = out / _PARTIAL if out is not None else None
        self.sums = {i: _zeros(view.layers[i].value_projection) for i in layers}
        self.half: dict[int, Tensor] = {}  # packed
        self.rows = self.tokens = self.half_tokens = self.compared = 0
        self.convergence: dict[int, float] = {}
        # Where the sums are kept, to be compared with later ones. Fewer tokens than columns say nothing.
        self.marks = [wanted / 2]
        while until is not None and self.marks[-1] / 2 >= max(len(c) for c in self.sums.values()):
            self.marks.append(self.marks[-1] / 2)
        self._resume()

    def over(self, rows: Iterator[list[int]], most: int, progress: Progress) -> None:
        saved = time.monotonic()
        for _ in range(self.rows):
            next(rows, None)
        progress("statistics", self.tokens, self.wanted)
        while batch := list(islice(rows, max(1, most // self.blank.sequence))):
            self._add(batch)
            progress("statistics", min(self.tokens, self.wanted), self.wanted)
            if self._arrived() and self._converged():
                return
            if self.partial is not None and time.monotonic() - saved > _SAVE_EVERY:
                self._checkpoint()
                saved = time.monotonic()

    def _arrived(self) -> bool:
        """Whether a mark was passed since the last one."""
        return any(self.half_tokens < mark <= self.tokens for mark in self.marks)

    def _converged(self) -> bool:
        """Compare with the sums of the mark before, if early stopping is asked for; else keep these instead."""
        if self.half and self.until is not None:
            self.convergence = self._change()
            if max(self.convergence.values()) <= self.until:
                return True
        self.half = {i: pack_triangle(c).cpu() for i, c in self.sums.items()}
        self.half_tokens = self.compared = self.tokens
        return False

    def _change(self) -> dict[int, float]:
        self.compared = self.tokens
        return {
            i: action_change(self.half[i] / self.half_tokens, pack_triangle(c).cpu() / self.tokens)
            for i, c in self.sums.items()
        }

    @torch.no_grad()
    def _add(self, batch: list[list[int]]) -> None:
        width = max(map(len, batch))
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(batch):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        rows = Rows(ids, mask, torch.zeros(len(batch), dtype=torch.long))
        keys = self.view.forward(rows, stop=self.layers[-1], keys=self.layers).keys
        real = mask.bool().flatten()
        for device in {c.device for c in self.sums.values()}:
            here = [i for i in self.layers if self.sums[i].device == device]
            every = [keys[i].flatten(0, 1).to(device) for i in here]
            if every[0].dtype == torch.float64:
                every = [x.float() for x in every]
            second_moment_([self.sums[i] for i in here], every, mask=real.to(device))
        self.rows += len(batch)
        self.tokens += int(mask.sum())

    def result(self) -> KeyStatistics:
        """The statistics, in the memory of the sums."""
        for i, c in self.sums.items():
            if not bool(torch.isfinite(c.diagonal()).all()):  # a square that is finite has finite factors
                raise NonFiniteError(
                    f"the keys of layer {i} hold NaN or infinity; load the model in float32 or bfloat16"
                )
        if self.half and self.compared < self.tokens:
            self.convergence = self._change()
        moments = {i: symmetrise_(c.cpu().div_(max(1, self.tokens))) for i, c in self.sums.items()}
        return replace(self.blank, moments=moments, tokens=self.tokens, convergence=self.convergence)

    def _identity(self) -> dict[str, Any]:
        header = self.blank.header()
        return {**header, "layers": self.layers, "wanted": self.wanted, "until": self.until}

    def _checkpoint(self) -> None:
        if self.partial is None:
            return
        header = {"of": self._identity(), "rows": self.rows, "counts": [self.tokens, self.half_tokens]}
        sums = {f"sum/{i}": pack_triangle(c) for i, c in self.sums.items()}
        tensors = sums | {f"half/{i}": c for i, c in self.half.items()}
        write_tensors(self.partial, KIND + "-partial", header, tensors)

    def _resume(self) -> None:
        if self.partial is None or not self.partial.is_file():
            return
        header, tensors = read_tensors(self.partial, KIND + "-partial")
        if header["of"] != self._identity():
            return  # of another model, text or request: start anew and overwrite it
        self.rows, (self.tokens, self.half_tokens) = header["rows"], header["counts"]
        self.compared = self.half_tokens
        for i in self.layers:
            self.sums[i].copy_(unpack_triangle(tensors[f"sum/{i}"]))
        self.half = {i: tensors[f"half/{i}"] for i in self.layers if f"half/{i}" in tensors}


def _packed_rows(encoder: Encoder, passages: Sequence[str], length: int, tokens: int) -> Iterator[list[int]]:
    """Passages one after the other with an end token between them, cut into rows of equal length."""
    tokenizer = encoder.tokenizer
    end = tokenizer.eos_token_id
    buffer: list[int] = []
    left = tokens
    for passage in passages:
        buffer += tokenizer(passage, add_special_tokens=False)["input_ids"]
        if end is not None:
            buffer.append(end)
        while len(buffer) >= length:
            row, buffer = buffer[: min(length, left)], buffer[length:]
            yield row
            left -= len(row)
            if left <= 0:
                return
    if buffer:
        yield buffer[:left]


def _zeros(projection: LinearView) -> Tensor:
    """Sums of a layer's keys: beside them on a GPU; on the CPU otherwise, for not every device has float64."""
    device = projection.weight.device
    return torch.zeros(
        projection.d_in, projection.d_in, dtype=torch.float64, device=device if device.type == "cuda" else "cpu"
    )
