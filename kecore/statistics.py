"""Key statistics: the uncentred second moment of each layer's keys over natural text.

What MEMIT calls ``C = E[k kᵀ]`` (arXiv 2210.07229, eq. 14). Peers run the whole model once per layer over a
hundred thousand documents; here one pass over packed tokens serves all layers and stops at the last one,
and the number of tokens follows from the key width (a small multiple is enough: arXiv 2506.04226), with a
figure that tells whether it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kecore._version import __version__
from kecore.corpus import Corpus
from kecore.errors import NonFiniteError, NumericalError, StatisticsMismatchError
from kecore.files import read_tensors, write_tensors
from kecore.method import Progress, silent
from kecore.model_view import Fingerprint, Identity, ModelView
from kecore.ops import second_moment_
from kecore.text import Encoder, Rows

__all__ = ["TOKENS_PER_WIDTH", "KeyStatistics", "token_budget"]

TOKENS_PER_WIDTH = 20
"""Tokens per column of the key; arXiv 2506.04226 finds 10 enough for Llama-2 with a ridge."""

_FILE = "statistics.safetensors"
_PARTIAL = "statistics.partial.safetensors"
_KIND = "key-statistics"
_FORMAT = 1
_SEQUENCE = 512
_TOKENS_PER_PASS = 4096
_SAVE_EVERY = 20.0  # seconds between checkpoints of a long run
_CHARACTERS_PER_PASSAGE = 100  # lower bound, to size the reservoir


def token_budget(view: ModelView) -> int:
    """Tokens that estimate the second moment well enough for the model's key width."""
    return TOKENS_PER_WIDTH * max(layer.value_projection.d_in for layer in view.layers)


@dataclass(frozen=True, eq=False)
class KeyStatistics:
    """Second moments of the keys of some layers of one model.

    Args:
        moments: layer index to ``[d_in, d_in]`` float64, the mean of ``k kᵀ``; symmetric.
        tokens: how many keys each is the mean of.
        base: layer index to the fingerprint of the weights that the keys depend on.
        corpus: digest of the text.
        sources: where the text came from, for people.
        seed: seed of the sampling of passages.
        sequence: tokens per packed row.
        convergence: layer index to the relative change of ``C⁻¹`` on random keys from half the tokens to
            all of them.
        version: kecore that collected them.
    """

    moments: Mapping[int, Tensor]
    tokens: int
    base: Mapping[int, Fingerprint]
    corpus: str
    sources: tuple[str, ...] = ()
    seed: int = 0
    sequence: int = _SEQUENCE
    convergence: Mapping[int, float] = field(default_factory=dict)
    version: str = __version__
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have statistics, ascending."""
        return tuple(sorted(self.moments))

    def moment(self, layer: int) -> Tensor:
        """The second moment of one layer, ``[d_in, d_in]`` float64.

        Raises:
            StatisticsMismatchError: the layer was not collected.
        """
        if layer not in self.moments:
            raise StatisticsMismatchError(
                f"no statistics for layer {layer}; these cover {list(self.layers)}. Collect it with "
                f"`kecore stats MODEL --layers {layer} ...`, or edit one of the covered layers"
            )
        return self.moments[layer]

    def factor(self, layer: int, ridge: float = 0.0) -> Tensor:
        """``L⁻¹`` of ``C + ridge·mean(diag C)·I = L Lᵀ``, ``[d_in, d_in]`` float32.

        Factored in float64 once, kept in float32: its condition is the square root of C's
        (error of a solve at condition 1e8: 1e-4, where a float32 solve of C fails).

        Raises:
            NumericalError: C is singular; names the ridge that helps.
        """
        key = ("factor", layer, ridge)
        if key not in self._memo:
            c = self.moment(layer)
            size = float(c.diagonal().mean())
            eye = torch.eye(len(c), dtype=c.dtype)
            lower, info = torch.linalg.cholesky_ex(c + ridge * size * eye)
            if int(info) != 0:
                raise NumericalError(
                    f"the key statistics of layer {layer} are singular ({self.tokens} tokens for width {len(c)}); "
                    f"collect more tokens, or use a ridge of at least {max(1e-6, 10 * ridge):.0e}"
                )
            self._memo[key] = torch.linalg.solve_triangular(lower, eye, upper=False).float()
        return self._memo[key]

    def spectrum(self, layer: int) -> tuple[Tensor, Tensor]:
        """Eigenvalues (descending) ``[d_in]`` and eigenvectors ``[d_in, d_in]`` of C, float64."""
        key = ("spectrum", layer)
        if key not in self._memo:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # two LAPACK threads on busy cores were measured 20x slower
            try:
                values, vectors = torch.linalg.eigh(self.moment(layer))
            finally:
                torch.set_num_threads(threads)
            self._memo[key] = (values.flip(0), vectors.flip(1))
        return self._memo[key]

    def check(self, view: ModelView, identity: Identity | None = None) -> None:
        """Refuse statistics that were collected on other weights.

        Raises:
            StatisticsMismatchError: names the layers and what differs.
        """
        identity = identity or view.identity()
        if any(layer >= len(view.layers) for layer in self.layers):
            raise StatisticsMismatchError(
                f"the statistics cover layers {list(self.layers)}, the model has {len(view.layers)}"
            )
        for layer, fingerprint in self.base.items():
            difference = fingerprint.differs(identity, view.dtype, _below(view, layer))
            if difference:
                raise StatisticsMismatchError(
                    f"the statistics of layer {layer} were collected on other weights: fingerprint {difference}. "
                    "Collect them anew with `kecore stats`, or load the model they belong to"
                )

    def save(self, path: str | Path) -> Path:
        """Write ``statistics.safetensors`` into a folder (or to a ``.safetensors`` file), atomically."""
        path = Path(path)
        file = path if path.suffix == ".safetensors" else path / _FILE
        return write_tensors(file, _KIND, self.header(), {f"{i}": _packed(c) for i, c in self.moments.items()})

    def header(self) -> dict[str, Any]:
        """What identifies the statistics, as JSON values."""
        return {
            "format": _FORMAT,
            "version": self.version,
            "tokens": self.tokens,
            "corpus": self.corpus,
            "sources": list(self.sources),
            "seed": self.seed,
            "sequence": self.sequence,
            "convergence": {str(i): x for i, x in self.convergence.items()},
            "base": {str(i): {"dtype": f.dtype, "digests": dict(f.digests)} for i, f in self.base.items()},
        }

    @classmethod
    def load(cls, path: str | Path) -> KeyStatistics:
        """Read statistics.

        Raises:
            ArtifactError: missing, truncated, corrupt, foreign, or from a newer kecore.
        """
        path = Path(path)
        header, tensors = read_tensors(path / _FILE if path.is_dir() else path, _KIND, newest=_FORMAT)
        return cls(
            moments={int(i): _unpacked(t) for i, t in tensors.items()},
            tokens=header["tokens"],
            base={int(i): Fingerprint(**f) for i, f in header["base"].items()},
            corpus=header["corpus"],
            sources=tuple(header["sources"]),
            seed=header["seed"],
            sequence=header["sequence"],
            convergence={int(i): x for i, x in header["convergence"].items()},
            version=header["version"],
        )

    @classmethod
    def collect(
        cls,
        view: ModelView,
        encoder: Encoder,
        corpus: Corpus,
        layers: Sequence[int],
        *,
        tokens: int | None = None,
        seed: int = 0,
        out: str | Path | None = None,
        progress: Progress = silent,
    ) -> KeyStatistics:
        """Collect the statistics of several layers in one pass over the text.

        Args:
            view: the unedited model.
            encoder: its tokenizer.
            corpus: natural text.
            layers: which layers.
            tokens: how many tokens; by default :func:`token_budget`. Less if the corpus is smaller.
            seed: seeds the choice of passages.
            out: folder for the result. A run that was killed continues from its last checkpoint there and
                counts nothing twice.
            progress: called with tokens done.

        Raises:
            NonFiniteError: the keys hold NaN or infinity.
        """
        layers = sorted({view.layer(i).index for i in layers})
        wanted = tokens or token_budget(view)
        passages, digest = corpus.sample(max(64, 8 * wanted // _CHARACTERS_PER_PASSAGE), seed)
        identity = view.identity()
        base = {i: Fingerprint.of(identity, view.dtype, _below(view, i)) for i in layers}
        blank = cls({}, 0, base, digest, corpus.sources, seed, min(_SEQUENCE, view.max_length or _SEQUENCE))
        run = _Run(view, blank, layers, wanted, Path(out) if out is not None else None)
        rows = _packed_rows(encoder, passages, blank.sequence, wanted)
        with view.frozen():
            run.over(rows, progress)
        result = run.result()
        if out is not None:
            result.save(out)
            (Path(out) / _PARTIAL).unlink(missing_ok=True)
        return result


class _Run:
    """Sums of a collection under way, and its checkpoints."""

    def __init__(self, view: ModelView, blank: KeyStatistics, layers: list[int], wanted: int, out: Path | None) -> None:
        self.view, self.blank, self.layers, self.wanted = view, blank, layers, wanted
        self.partial = out / _PARTIAL if out is not None else None
        width = {i: view.layers[i].value_projection.d_in for i in layers}
        self.sums = {i: torch.zeros(width[i], width[i], dtype=torch.float64) for i in layers}
        self.half: dict[int, Tensor] = {}
        self.rows = self.tokens = self.half_tokens = 0
        self._resume()

    def over(self, rows: Iterator[list[int]], progress: Progress) -> None:
        saved = time.monotonic()
        for _ in range(self.rows):
            next(rows, None)
        progress("statistics", self.tokens, self.wanted)
        while batch := list(islice(rows, max(1, _TOKENS_PER_PASS // self.blank.sequence))):
            self._add(batch)
            progress("statistics", min(self.tokens, self.wanted), self.wanted)
            if not self.half and self.tokens >= self.wanted / 2:
                self.half, self.half_tokens = {i: c.clone() for i, c in self.sums.items()}, self.tokens
            if self.partial is not None and time.monotonic() - saved > _SAVE_EVERY:
                self._checkpoint()
                saved = time.monotonic()

    @torch.no_grad()
    def _add(self, batch: list[list[int]]) -> None:
        width = max(map(len, batch))
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(batch):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        rows = Rows(ids, mask, torch.zeros(len(batch), dtype=torch.long))
        keys = self.view.forward(rows, stop=self.layers[-1], keys=self.layers).keys
        real = mask.bool()
        for i in self.layers:
            second_moment_(self.sums[i], keys[i][real.to(keys[i].device)])
        self.rows += len(batch)
        self.tokens += int(mask.sum())

    def result(self) -> KeyStatistics:
        moments = {i: _symmetric(c) / max(1, self.tokens) for i, c in self.sums.items()}
        for i, c in moments.items():
            if not bool(torch.isfinite(c).all()):
                raise NonFiniteError(
                    f"the keys of layer {i} hold NaN or infinity; load the model in float32 or bfloat16"
                )
        convergence: dict[int, float] = {}
        if self.half and self.half_tokens < self.tokens:
            convergence = {
                i: _action_change(_symmetric(self.half[i]) / self.half_tokens, moments[i]) for i in self.layers
            }
        b = self.blank
        return KeyStatistics(moments, self.tokens, b.base, b.corpus, b.sources, b.seed, b.sequence, convergence)

    def _identity(self) -> dict[str, Any]:
        header = self.blank.header()
        return {**header, "layers": self.layers, "wanted": self.wanted}

    def _checkpoint(self) -> None:
        if self.partial is None:
            return
        header = {"of": self._identity(), "rows": self.rows, "counts": [self.tokens, self.half_tokens]}
        tensors = {f"sum/{i}": c for i, c in self.sums.items()} | {f"half/{i}": c for i, c in self.half.items()}
        write_tensors(self.partial, _KIND + "-partial", header, tensors)

    def _resume(self) -> None:
        if self.partial is None or not self.partial.is_file():
            return
        header, tensors = read_tensors(self.partial, _KIND + "-partial")
        if header["of"] != self._identity():
            return  # of another model, text or request: start anew and overwrite it
        self.rows, (self.tokens, self.half_tokens) = header["rows"], header["counts"]
        self.sums = {i: tensors[f"sum/{i}"].clone() for i in self.layers}
        self.half = {i: tensors[f"half/{i}"].clone() for i in self.layers if f"half/{i}" in tensors}


def _below(view: ModelView, layer: int) -> Callable[[str], bool]:
    """Names of the parameters that the keys of ``layer`` depend on."""
    above = tuple(f"{part.name}." for part in view.layers[layer + 1 :])
    outside = {id(p) for m in (view.final_norm, view.unembedding) if m is not None for p in m.parameters()}
    embedding = view.model.get_input_embeddings()  # type: ignore[operator, union-attr]
    outside -= {id(p) for p in embedding.parameters()}
    skipped = {name for name, p in view.model.named_parameters() if id(p) in outside}
    skipped.add(view.layers[layer].value_projection.name)
    return lambda name: name not in skipped and not name.startswith(above)


def _packed_rows(encoder: Encoder, passages: list[str], length: int, tokens: int) -> Iterator[list[int]]:
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


def _symmetric(lower: Tensor) -> Tensor:
    return lower.tril() + lower.tril(-1).t()


def _action_change(half: Tensor, whole: Tensor) -> float:
    """Relative change of ``C⁻¹`` on random keys drawn from C."""
    d = len(whole)
    ridge = 1e-4 * float(whole.diagonal().mean()) * torch.eye(d, dtype=whole.dtype)
    lower = torch.linalg.cholesky(whole + ridge)
    noise = torch.randn(d, 16, dtype=whole.dtype, generator=torch.Generator().manual_seed(0))
    keys = lower @ noise
    new = torch.cholesky_solve(keys, lower)
    old = torch.cholesky_solve(keys, torch.linalg.cholesky(half + ridge))
    return float((old - new).norm() / new.norm())


def _packed(matrix: Tensor) -> Tensor:
    """The lower triangle of a symmetric matrix, row after row."""
    return torch.cat([matrix[i, : i + 1] for i in range(len(matrix))])


def _unpacked(triangle: Tensor) -> Tensor:
    d = int(((8 * triangle.numel() + 1) ** 0.5 - 1) / 2)
    out = torch.zeros(d, d, dtype=triangle.dtype)
    begin = 0
    for i in range(d):
        out[i, : i + 1] = triangle[begin : begin + i + 1]
        begin += i + 1
    return _symmetric(out)
