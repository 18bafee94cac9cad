"""Collects key statistics: one pass over packed tokens serves all layers and stops at the last one.

Peers run the whole model once per layer over a hundred thousand documents; here the number of tokens follows from the
key width (a small multiple is enough: arXiv 2506.04226), with a figure that tells whether it was.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kecore.api.errors import KecoreWarning, NonFiniteError
from kecore.api.identity import Fingerprint, type_name
from kecore.api.progress import Progress, silent
from kecore.corpus import Corpus, TextSample
from kecore.files import read_tensors, write_tensors
from kecore.memory import Need, Work, cast_bytes, forward_bytes, pass_tokens
from kecore.model import Key, LinearView, ModelView, Routed, Routing, SiteId, ValueSite
from kecore.model.sites import Site
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
    """Return how many tokens estimate the second moments well enough for the model's key width.

    An expert sees only the tokens that are routed to it, so that many more are run.
    """
    columns = [0.0]
    for layer in view.layers:
        tokens_per_key = 1.0 if layer.experts is None else layer.experts.count / layer.experts.top_k
        columns += [site.linear.d_in * tokens_per_key for site in layer.sites]
    return round(TOKENS_PER_WIDTH * max(columns))


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
    sites = _sites(view, layers)
    budget = tokens or token_budget(view)
    sample = text if isinstance(text, TextSample) else sample_text(text, budget, seed)
    identity = view.identity()
    blank = KeyStatistics(
        moments={},
        tokens=0,
        base={site.id: Fingerprint.of(identity, view.dtype, weights_below(view, site.id)) for site in sites},
        corpus=sample.digest,
        sources=sample.sources,
        seed=sample.seed,
        sequence=min(SEQUENCE, view.max_length or SEQUENCE),
        precision=None if precision is None else type_name(precision),
    )
    run = _Run(
        view=view,
        blank=blank,
        sites=sites,
        budget=budget,
        until=until,
        partial=Path(out) / _PARTIAL if out is not None else None,
    )
    run.resume()
    rows = pack_rows(encoder, sample.passages, blank.sequence, budget)
    with view.frozen(), view.cast(precision):
        run.add_rows(rows, tokens_per_pass(view, layers, memory), progress)
    result = run.result()
    del run  # its sums are the result's moments, which are mapped from the file in a moment
    if until is not None:
        largest_change = max(result.convergence.values(), default=math.inf)
        if not largest_change <= until:  # NaN too
            warnings.warn(_not_converged(result.tokens, largest_change, until), KecoreWarning, stacklevel=2)
    if out is None:
        return result
    file = result.save(out)
    (Path(out) / _PARTIAL).unlink(missing_ok=True)
    return KeyStatistics.load(file)


def collection_need(view: ModelView, layers: Sequence[int], tokens: int, precision: torch.dtype | None = None) -> Need:
    """Estimate what collecting the statistics of these layers takes in memory."""
    sites = _sites(view, layers)
    widths = [site.linear.d_in for site in sites]
    read_widths = [site.linear.d_in for site in sites if site.expert is None]  # of what a token is read as
    for layer in {site.layer for site in sites if site.expert is not None}:
        experts = view.experts(layer)
        read_widths.append(view.width + experts.top_k * experts.d_in)
    row_length = min(SEQUENCE, view.max_length or SEQUENCE)
    squares = sum(width * width for width in widths)
    parts = {
        "sums": 8 * squares,  # float64
        "sums at half": 4 * squares,  # half of each matrix, float64
        "comparison": 16 * max(widths) ** 2,  # two matrices of the widest layer, float64
        "checkpoint": 4 * squares,
    }
    parts |= cast_bytes(view, precision)
    token_bytes = forward_bytes(view) + 4 * sum(read_widths)
    at_once = min(tokens, pass_tokens(view))
    work = Work(
        passes=math.ceil(tokens / at_once),
        tokens=tokens,
        layers=1 + max(layers, default=0),
        operations=tokens * squares,  # half of each matrix; the other half is the same
    )
    return Need("statistics", parts, token_bytes, at_once, row_length, work=work)


def _sites(view: ModelView, layers: Sequence[int]) -> list[ValueSite]:
    """Return the sites of these layers, ascending."""
    sites: list[ValueSite] = []
    for layer in sorted(set(layers)):
        view.layer(layer).check_sites()
        sites += view.layer(layer).sites
    return sites


def tokens_per_pass(view: ModelView, layers: Sequence[int], memory: int | None) -> int:
    """Return how many tokens run at a time, within a budget in bytes if there is one."""
    most_tokens = pass_tokens(view)
    return most_tokens if memory is None else collection_need(view, layers, most_tokens).micro_batch(memory)


def _not_converged(tokens: int, change: float, until: float) -> str:
    return (
        f"the key statistics still change by {change:.3g} from half of their {tokens:,} tokens to all of them "
        f"(asked for {until:g}); take more tokens, or more text if it was used up"
    )


class _Run:
    """Sums of a collection under way, and its checkpoints.

    Args:
        view: the model, frozen by the caller.
        blank: the statistics without moments: what identifies the collection.
        sites: where to collect, ascending.
        budget: tokens to collect.
        until: relative change at which to stop early; None to use the whole budget.
        partial: file of the checkpoints; None to write none.
    """

    def __init__(
        self,
        *,
        view: ModelView,
        blank: KeyStatistics,
        sites: list[ValueSite],
        budget: int,
        until: float | None,
        partial: Path | None,
    ) -> None:
        self.view, self.blank, self.budget, self.until = view, blank, budget, until
        self.partial = partial
        self.sums = {site.id: _zeros(site.linear) for site in sites}
        self.half: dict[SiteId, Tensor] = {}  # triangles of the sums at the last mark
        self.rows = self.tokens = 0
        self.half_tokens = 0  # tokens in `half`
        self.compared_tokens = 0  # tokens at the last comparison with `half`
        self.convergence: dict[SiteId, float] = {}
        self.marks = self._choose_marks()

    def _choose_marks(self) -> list[float]:
        """Return the token counts at which the sums are stored, to be compared with later ones."""
        widest = max(len(moment) for moment in self.sums.values())
        marks = [self.budget / 2]
        # Fewer tokens than columns say nothing.
        while self.until is not None and marks[-1] / 2 >= widest:
            marks.append(marks[-1] / 2)
        return marks

    def add_rows(self, rows: Iterator[list[int]], most_tokens: int, progress: Progress) -> None:
        """Add rows until the budget is used up or the sums have converged.

        Args:
            rows: packed rows, from the first one of the collection; those that a checkpoint holds are skipped.
            most_tokens: tokens of one pass through the model.
            progress: called with tokens done.
        """
        saved = time.monotonic()
        for _ in range(self.rows):
            next(rows, None)
        progress("statistics", self.tokens, self.budget)
        rows_per_pass = max(1, most_tokens // self.blank.sequence)
        while batch := list(islice(rows, rows_per_pass)):
            self._add(batch)
            progress("statistics", min(self.tokens, self.budget), self.budget)
            if self._passed_mark() and self._compare_with_mark():
                return
            if self.partial is not None and time.monotonic() - saved > _SAVE_EVERY:
                self._checkpoint(self.partial)
                saved = time.monotonic()

    def _passed_mark(self) -> bool:
        """Return whether a mark was passed since the sums were last stored."""
        return any(self.half_tokens < mark <= self.tokens for mark in self.marks)

    def _compare_with_mark(self) -> bool:
        """Compare with the sums of the mark before, if early stopping is asked for, and store these if it goes on.

        Returns:
            Whether the collection may stop here.
        """
        if self.half and self.until is not None:
            self.convergence = self._change()
            if max(self.convergence.values()) <= self.until:
                return True
        self.half = {site: pack_triangle(moment).cpu() for site, moment in self.sums.items()}
        self.half_tokens = self.compared_tokens = self.tokens
        return False

    def _change(self) -> dict[SiteId, float]:
        """Measure each site's relative change of the inverse moment since the last mark."""
        self.compared_tokens = self.tokens
        changes: dict[SiteId, float] = {}
        for site, moment in self.sums.items():
            earlier = self.half[site] / self.half_tokens
            changes[site] = action_change(earlier, pack_triangle(moment).cpu() / self.tokens)
        return changes

    @torch.no_grad()
    def _add(self, batch: list[list[int]]) -> None:
        """Run a batch of token rows through the model and add the keys of its real tokens to the sums."""
        states = run_keys(self.view, list(self.sums), batch)
        for layer, routing in states.routing.items():
            self._add_routed(layer, routing)
        for device in {self.sums[site].device for site in states.keys}:
            sites = [site for site in states.keys if self.sums[site].device == device]
            site_keys = [states.keys[site].to(device) for site in sites]  # each [rows * width, d_in]
            if site_keys[0].dtype == torch.float64:
                site_keys = [keys.float() for keys in site_keys]
            second_moment_([self.sums[site] for site in sites], site_keys, mask=states.is_real.to(device))
        self.rows += len(batch)
        self.tokens += int(states.is_real.sum())

    def _add_routed(self, layer: int, routing: Routing) -> None:
        """Add the weighted keys of a layer's experts to their sums; for tokens that are not routed there they are 0."""
        keys = self.view.experts(layer).keys(routing)  # [n, k, d_in]
        for site, moment in self.sums.items():
            if site.layer != layer or site.expert is None:
                continue
            expert_keys = keys[routing.experts == site.expert]  # [tokens of this expert, d_in]
            if len(expert_keys):
                second_moment_([moment], [expert_keys.to(moment.device)])

    def result(self) -> KeyStatistics:
        """Return the statistics, in the memory of the sums.

        Raises:
            NonFiniteError: the keys of a layer hold NaN or infinity.
        """
        for site, moment in self.sums.items():
            if not bool(torch.isfinite(moment.diagonal()).all()):  # a square that is finite has finite factors
                raise NonFiniteError(
                    f"the keys of layer {site} hold NaN or infinity; load the model in float32 or bfloat16"
                )
        if self.half and self.compared_tokens < self.tokens:
            self.convergence = self._change()
        count = max(1, self.tokens)
        moments = {site: symmetrise_(moment.cpu().div_(count)) for site, moment in self.sums.items()}
        return replace(self.blank, moments=moments, tokens=self.tokens, convergence=self.convergence)

    def _identity(self) -> dict[str, Any]:
        """Return everything that a checkpoint must agree in to be continued, as JSON values."""
        header = self.blank.header()
        return {**header, "layers": [str(site) for site in self.sums], "wanted": self.budget, "until": self.until}

    def _checkpoint(self, file: Path) -> None:
        """Write the sums and where they stand, for :meth:`resume`."""
        header = {"of": self._identity(), "rows": self.rows, "counts": [self.tokens, self.half_tokens]}
        tensors = {f"sum/{site}": pack_triangle(moment) for site, moment in self.sums.items()}
        tensors |= {f"half/{site}": triangle for site, triangle in self.half.items()}
        write_tensors(file, KIND + "-partial", header, tensors)

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one of this very collection."""
        if self.partial is None or not self.partial.is_file():
            return
        header, tensors = read_tensors(self.partial, KIND + "-partial")
        if header["of"] != self._identity():
            return  # of another model, text or request: start anew and overwrite it
        self.rows = header["rows"]
        self.tokens, self.half_tokens = header["counts"]
        self.compared_tokens = self.half_tokens
        for site, moment in self.sums.items():
            moment.copy_(unpack_triangle(tensors[f"sum/{site}"]))
            if f"half/{site}" in tensors:
                self.half[site] = tensors[f"half/{site}"]


@dataclass(frozen=True, slots=True)
class KeyStates:
    """The keys of a batch of token rows.

    Args:
        keys: site to the keys of all tokens, ``[rows * width, d_in]``.
        is_real: which of them are no padding, ``[rows * width]``.
        routing: index of a layer with experts to the routing of the tokens that are no padding.
    """

    keys: dict[SiteId, Tensor]
    is_real: Tensor
    routing: dict[int, Routing]


def run_keys(view: ModelView, sites: Sequence[SiteId], batch: Sequence[Sequence[int]]) -> KeyStates:
    """Run rows of token ids through a model, up to the last of some layers, and return the keys there."""
    width = max(map(len, batch))
    ids = torch.zeros(len(batch), width, dtype=torch.long)  # [rows, width]
    mask = torch.zeros_like(ids)
    for index, row in enumerate(batch):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    rows = Rows(ids, mask, torch.zeros(len(batch), dtype=torch.long))
    key_taps = {site: Key(site.layer) for site in sites if site.expert is None}
    routed_layers = sorted({site.layer for site in sites if site.expert is not None})
    taps: list[Site] = list(key_taps.values())
    for layer in routed_layers:
        taps += [Routed(layer, "states"), Routed(layer, "experts"), Routed(layer, "weights")]
    states = view.run(rows, taps=taps, last=max(sites).layer)  # each [rows, width, n]
    keys = {site: states[tap].flatten(0, 1) for site, tap in key_taps.items()}
    is_real = mask.bool().flatten()  # [rows * width]
    routing: dict[int, Routing] = {}
    for layer in routed_layers:
        everywhere = Routing(
            states[Routed(layer, "states")].flatten(0, 1),
            states[Routed(layer, "experts")].flatten(0, 1),
            states[Routed(layer, "weights")].flatten(0, 1),
        )
        routing[layer] = everywhere.at(is_real.to(everywhere.states.device))
    return KeyStates(keys, is_real, routing)


def pack_rows(encoder: Encoder, passages: Sequence[str], length: int, tokens: int) -> Iterator[list[int]]:
    """Yield passages one after the other with an end token between them, cut into rows of equal length."""
    tokenizer = encoder.tokenizer
    end = tokenizer.eos_token_id
    buffer: list[int] = []
    remaining = tokens
    for passage in passages:
        buffer += tokenizer(passage, add_special_tokens=False)["input_ids"]
        if end is not None:
            buffer.append(end)
        while len(buffer) >= length:
            row, buffer = buffer[: min(length, remaining)], buffer[length:]
            yield row
            remaining -= len(row)
            if remaining <= 0:
                return
    if buffer:
        yield buffer[:remaining]


def _zeros(projection: LinearView) -> Tensor:
    """Make room for the sums of a map's keys, ``[d_in, d_in]`` float64.

    Beside its weight on a GPU; on the CPU otherwise, for not every device has float64.
    """
    device = projection.weight.device
    if device.type != "cuda":
        device = torch.device("cpu")
    return torch.zeros(projection.d_in, projection.d_in, dtype=torch.float64, device=device)
