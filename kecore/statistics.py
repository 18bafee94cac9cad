"""Key statistics: the uncentred second moment of each layer's keys over natural text.

What MEMIT calls ``C = E[k kᵀ]`` (arXiv 2210.07229, eq. 14). Peers run the whole model once per layer over a
hundred thousand documents; here one pass over packed tokens serves all layers and stops at the last one,
and the number of tokens follows from the key width (a small multiple is enough: arXiv 2506.04226), with a
figure that tells whether it was. Files are memory-mapped, one layer at a time is unpacked, and what is derived from a
moment (its factor, its eigenvectors) is kept on disk under a digest of the moment and mapped from there.
"""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kecore._version import __version__
from kecore.corpus import Corpus
from kecore.errors import KecoreWarning, NonFiniteError, NumericalError, StatisticsMismatchError
from kecore.files import kept, read_tensors, write_tensors
from kecore.memory import Need, cast_bytes, forward_bytes, pass_tokens
from kecore.method import Progress, silent
from kecore.model_view import Fingerprint, Identity, LinearView, ModelView
from kecore.ops import second_moment_
from kecore.text import Encoder, Rows
from kecore.triangular import action_change, cholesky_, inverse_, packed, symmetrise_, triangle_width, unpacked

__all__ = ["TOKENS_PER_WIDTH", "KeyStatistics", "collecting", "token_budget"]

TOKENS_PER_WIDTH = 20
"""Tokens per column of the key; arXiv 2506.04226 finds 10 enough for Llama-2 with a ridge."""

_FILE = "statistics.safetensors"
_PARTIAL = "statistics.partial.safetensors"
_KIND = "key-statistics"
_FORMAT = 1
_SEQUENCE = 512
_SAVE_EVERY = 20.0  # seconds between checkpoints of a long run
_CHARACTERS_PER_PASSAGE = 100  # lower bound, to size the reservoir
_WORTH_KEEPING = 1024  # columns below which a factor is made as quickly as it is read
_METHOD = "1"  # of deriving factors and spectra: raised when other numbers would come out


def token_budget(view: ModelView) -> int:
    """Tokens that estimate the second moment well enough for the model's key width."""
    return TOKENS_PER_WIDTH * max(layer.value_projection.d_in for layer in view.layers)


@dataclass(frozen=True, eq=False)
class KeyStatistics:
    """Second moments of the keys of some layers of one model.

    Args:
        moments: layer index to ``[d_in, d_in]`` float64, the mean of ``k kᵀ``; symmetric. Those of a file are
            unpacked from it each time they are asked for.
        tokens: how many keys each is the mean of.
        base: layer index to the fingerprint of the weights that the keys depend on.
        corpus: digest of the text.
        sources: where the text came from, for people.
        seed: seed of the sampling of passages.
        sequence: tokens per packed row.
        precision: type that the model ran in, ``"bfloat16"`` say; None for its own.
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
    precision: str | None = None
    convergence: Mapping[int, float] = field(default_factory=dict)
    version: str = __version__
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False, init=False)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have statistics, ascending."""
        return tuple(sorted(self.moments))

    def need(self, layer: int) -> None:
        """Refuse a layer that was not collected.

        Raises:
            StatisticsMismatchError: names those that were.
        """
        if layer not in self.moments:
            raise StatisticsMismatchError(
                f"no statistics for layer {layer}; these cover {list(self.layers)}. Collect it with "
                f"`kecore stats MODEL --layers {layer} ...`, or edit one of the covered layers"
            )

    def moment(self, layer: int) -> Tensor:
        """The second moment of one layer, ``[d_in, d_in]`` float64.

        Raises:
            StatisticsMismatchError: the layer was not collected.
        """
        self.need(layer)
        return self.moments[layer]

    def width(self, layer: int) -> int:
        """``d_in`` of one layer.

        Raises:
            StatisticsMismatchError: the layer was not collected.
        """
        return triangle_width(self._triangle(layer))

    def mean_square(self, layer: int) -> float:
        """Mean square of a key's coordinates: the moment's mean diagonal, read without unpacking it.

        Raises:
            StatisticsMismatchError: the layer was not collected.
        """
        triangle = self._triangle(layer)
        place = torch.arange(triangle_width(triangle))
        return float(triangle[place * (place + 3) // 2].mean())

    def factor(self, layer: int, ridge: float = 0.0) -> Tensor:
        """``L⁻¹`` of ``C + ridge·mean(diag C)·I = L Lᵀ``, ``[d_in, d_in]`` float32.

        Factored in float64 once, kept in float32: its condition is the square root of C's
        (error of a solve at condition 1e8: 1e-4, where a float32 solve of C fails).

        Raises:
            NumericalError: C is singular; names the ridge that helps.
        """

        def make() -> dict[str, Tensor]:
            c = unpacked(self._triangle(layer))
            c.diagonal().add_(ridge * float(c.diagonal().mean()))
            lower = cholesky_(c)
            if lower is None:
                raise NumericalError(
                    f"the key statistics of layer {layer} are singular ({self.tokens} tokens for width {len(c)}); "
                    f"collect more tokens, or use a ridge of at least {max(1e-6, 10 * ridge):.0e}"
                )
            return {"factor": torch.empty(c.shape, dtype=torch.float32).copy_(inverse_(lower))}

        return self._derived("factor", layer, ridge, make)["factor"]

    def spectrum(self, layer: int) -> tuple[Tensor, Tensor]:
        """Eigenvalues (descending) ``[d_in]`` and eigenvectors ``[d_in, d_in]`` of C, float64."""

        def make() -> dict[str, Tensor]:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # two LAPACK threads on busy cores were measured 20x slower
            try:
                values, vectors = torch.linalg.eigh(unpacked(self._triangle(layer)))
            finally:
                torch.set_num_threads(threads)
            return {"values": values.flip(0), "vectors": vectors.flip(1)}

        found = self._derived("spectrum", layer, 0.0, make)
        return found["values"], found["vectors"]

    def _triangle(self, layer: int) -> Tensor:
        self.need(layer)
        mapped = self.moments
        return mapped.triangles[layer] if isinstance(mapped, _Mapped) else packed(mapped[layer])

    def _derived(self, what: str, layer: int, ridge: float, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What follows from a moment alone: made once, kept on disk by content, and memory-mapped from there."""
        key = (what, layer, ridge)
        if key not in self._memo:
            triangle = self._triangle(layer)
            if triangle.numel() < _WORTH_KEEPING**2 // 2:
                self._memo[key] = make()
            else:
                digest = hashlib.sha256(triangle.numpy().data)
                digest.update(repr((_METHOD, what, ridge)).encode())
                self._memo[key] = kept(f"{what}s", digest.hexdigest()[:32], what, make)
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
        return write_tensors(file, _KIND, self.header(), {f"{i}": self._triangle(i) for i in self.layers})

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
            "precision": self.precision,
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
            moments=_Mapped({int(i): t for i, t in tensors.items()}),
            tokens=header["tokens"],
            base={int(i): Fingerprint(**f) for i, f in header["base"].items()},
            corpus=header["corpus"],
            sources=tuple(header["sources"]),
            seed=header["seed"],
            sequence=header["sequence"],
            precision=header.get("precision"),
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
            corpus: natural text.
            layers: which layers.
            tokens: how many tokens; by default :func:`token_budget`. Less if the corpus is smaller.
            until: stop early, at a half, a quarter, an eighth ... of ``tokens``, once ``convergence`` is at most this
                in every layer. Warns where it never is.
            seed: seeds the choice of passages.
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
        passages, digest = corpus.sample(max(64, 8 * wanted // _CHARACTERS_PER_PASSAGE), seed)
        identity = view.identity()
        base = {i: Fingerprint.of(identity, view.dtype, _below(view, i)) for i in layers}
        sequence = min(_SEQUENCE, view.max_length or _SEQUENCE)
        name = None if precision is None else str(precision).removeprefix("torch.")
        blank = cls({}, 0, base, digest, corpus.sources, seed, sequence, name)
        run = _Run(view, blank, layers, wanted, until, Path(out) if out is not None else None)
        rows = _packed_rows(encoder, passages, blank.sequence, wanted)
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
        return cls.load(file)


def collecting(view: ModelView, layers: Sequence[int], tokens: int, precision: torch.dtype | None = None) -> Need:
    """What collecting the statistics of these layers takes in memory."""
    widths = [view.layer(i).value_projection.d_in for i in layers]
    row = min(_SEQUENCE, view.max_length or _SEQUENCE)
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
    return most if memory is None else collecting(view, layers, most).micro_batch(memory)


def _unconverged(found: KeyStatistics, until: float) -> str:
    worst = max(found.convergence.values(), default=math.inf)
    return (
        f"the key statistics still change by {worst:.3g} from half of their {found.tokens:,} tokens to all of them "
        f"(asked for {until:g}); take more tokens, or more text if it was used up"
    )


class _Mapped(Mapping[int, Tensor]):
    """Moments in a memory-mapped file; one is unpacked when asked for, and forgotten when nobody holds it."""

    def __init__(self, triangles: dict[int, Tensor]) -> None:
        self.triangles = triangles
        self._held: WeakValueDictionary[int, Tensor] = WeakValueDictionary()

    def __getitem__(self, layer: int) -> Tensor:
        found = self._held.get(layer)
        if found is None:
            found = self._held[layer] = unpacked(self.triangles[layer])
        return found

    def __contains__(self, layer: object) -> bool:
        return layer in self.triangles

    def __iter__(self) -> Iterator[int]:
        return iter(self.triangles)

    def __len__(self) -> int:
        return len(self.triangles)


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
        self.half = {i: packed(c).cpu() for i, c in self.sums.items()}
        self.half_tokens = self.compared = self.tokens
        return False

    def _change(self) -> dict[int, float]:
        self.compared = self.tokens
        return {
            i: action_change(self.half[i] / self.half_tokens, packed(c).cpu() / self.tokens)
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
        sums = {f"sum/{i}": packed(c) for i, c in self.sums.items()}
        tensors = sums | {f"half/{i}": c for i, c in self.half.items()}
        write_tensors(self.partial, _KIND + "-partial", header, tensors)

    def _resume(self) -> None:
        if self.partial is None or not self.partial.is_file():
            return
        header, tensors = read_tensors(self.partial, _KIND + "-partial")
        if header["of"] != self._identity():
            return  # of another model, text or request: start anew and overwrite it
        self.rows, (self.tokens, self.half_tokens) = header["rows"], header["counts"]
        self.compared = self.half_tokens
        for i in self.layers:
            self.sums[i].copy_(unpacked(tensors[f"sum/{i}"]))
        self.half = {i: tensors[f"half/{i}"] for i in self.layers if f"half/{i}" in tensors}


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


def _zeros(projection: LinearView) -> Tensor:
    """Sums of a layer's keys: beside them on a GPU; on the CPU otherwise, for not every device has float64."""
    device = projection.weight.device
    return torch.zeros(
        projection.d_in, projection.d_in, dtype=torch.float64, device=device if device.type == "cuda" else "cpu"
    )
