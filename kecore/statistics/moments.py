"""Key statistics: the uncentred second moment of the keys at each site over natural text.

What MEMIT calls ``C = E[k kᵀ]`` (arXiv 2210.07229, eq. 14); :mod:`kecore.statistics.collect` collects it. Files are
memory-mapped, one site at a time is unpacked, and what is derived from a moment (its factor, its eigenvectors) is kept
on disk under a digest of the moment and mapped from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kecore._version import __version__
from kecore.api.errors import NumericalError, StatisticsMismatchError
from kecore.api.identity import Fingerprint, Identity
from kecore.files import explain_content_errors, load_or_make, read_tensors, write_tensors
from kecore.hub import STATISTICS, artifact_file
from kecore.model import ModelView, SiteId
from kecore.statistics.triangular import (
    cholesky_,
    invert_,
    pack_triangle,
    triangle_width,
    unpack_triangle,
)

__all__ = ["KeyStatistics", "MomentOrigin", "PackedMoments", "weights_below"]

KIND = "key-statistics"
_FORMAT = 1
SEQUENCE = 512
_WORTH_STORING = 1024  # columns below which a factor is made as quickly as it is read
_EXPERT_RIDGE = 1e-3  # of the layer's mean diagonal: what an expert's moment is kept above
_METHOD = "1"  # of deriving factors and spectra: raised when other numbers would come out


@dataclass(frozen=True, slots=True)
class MomentOrigin:
    """Where a moment came from that kecore did not collect.

    Args:
        file: name of the file.
        sha256: digest of its bytes.
        tokens: how many keys it says that it is the mean of.
        dtype: type of the sums in it.
        difference: how far it was from fresh keys of the model; see :class:`kecore.statistics.spot.SpotCheck`.
        scale: by which factor the fresh keys were larger.
    """

    file: str
    sha256: str
    tokens: int
    dtype: str
    difference: float
    scale: float


@dataclass(frozen=True, eq=False)
class KeyStatistics:
    """Second moments of the keys at some sites of one model.

    Args:
        moments: site to ``[d_in, d_in]`` float64, the mean of ``k kᵀ``; symmetric. Those of a file are
            unpacked from it each time they are asked for.
        tokens: how many keys each is the mean of; of several numbers the lowest.
        base: site to the fingerprint of the weights that the keys depend on.
        corpus: digest of the text.
        sources: where the text came from, for people.
        seed: seed of the sampling of passages.
        sequence: tokens per packed row; 0 where it is not known.
        precision: type that the model ran in, ``"bfloat16"`` say; None for its own.
        convergence: site to the relative change of ``C⁻¹`` on random keys from half the tokens to
            all of them.
        version: kecore that collected them.
        origins: site to where its moment came from, where kecore did not collect it.
    """

    moments: Mapping[SiteId, Tensor]
    tokens: int
    base: Mapping[SiteId, Fingerprint]
    corpus: str
    sources: tuple[str, ...] = ()
    seed: int = 0
    sequence: int = SEQUENCE
    precision: str | None = None
    convergence: Mapping[SiteId, float] = field(default_factory=dict)
    version: str = __version__
    origins: Mapping[SiteId, MomentOrigin] = field(default_factory=dict)
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False, init=False)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have statistics, ascending."""
        return tuple(sorted({site.layer for site in self.moments}))

    @property
    def sites(self) -> tuple[SiteId, ...]:
        """Sites that have statistics, ascending."""
        return tuple(sorted(self.moments))

    def need(self, layer: int) -> None:
        """Refuse a layer that was not collected.

        Raises:
            StatisticsMismatchError: names those that were.
        """
        if layer not in self.layers:
            raise StatisticsMismatchError(
                f"no statistics for layer {layer}; these cover {list(self.layers)}. Collect it with "
                f"`kecore stats MODEL --layers {layer} ...`, or edit one of the covered layers"
            )

    def moment(self, site: SiteId) -> Tensor:
        """Return the second moment at one site, ``[d_in, d_in]`` float64.

        Raises:
            StatisticsMismatchError: the site was not collected.
        """
        self._need_site(site)
        return self.moments[site]

    def width(self, site: SiteId) -> int:
        """Return the key width ``d_in`` at one site.

        Raises:
            StatisticsMismatchError: the site was not collected.
        """
        return triangle_width(self._triangle(site))

    def mean_square(self, site: SiteId) -> float:
        """Return the mean square of a key's coordinates: the moment's mean diagonal, read without unpacking it.

        Raises:
            StatisticsMismatchError: the site was not collected.
        """
        triangle = self._triangle(site)
        row = torch.arange(triangle_width(triangle))  # [d_in]
        # Row i begins at i (i + 1) / 2 and ends with its diagonal element, i places on.
        return float(triangle[row * (row + 3) // 2].mean())

    def factor(self, site: SiteId, ridge: float = 0.0) -> Tensor:
        """Return ``L⁻¹`` of ``C + ridge·mean(diag C)·I = L Lᵀ``, ``[d_in, d_in]`` float32.

        Factored in float64 once, kept in float32: its condition is the square root of C's
        (error of a solve at condition 1e8: 1e-4, where a float32 solve of C fails).

        Raises:
            NumericalError: C is singular; names the ridge that helps.
        """
        floor = self._expert_floor(site)

        def factorise() -> dict[str, Tensor]:
            moment = unpack_triangle(self._triangle(site))
            moment.diagonal().add_(ridge * float(moment.diagonal().mean()) + floor)
            lower = cholesky_(moment)
            if lower is None:
                raise NumericalError(
                    f"the key statistics of layer {site} are singular ({self.tokens} tokens for width {len(moment)}); "
                    f"collect more tokens, or use a ridge of at least {max(1e-6, 10 * ridge):.0e}"
                )
            return {"factor": torch.empty(moment.shape, dtype=torch.float32).copy_(invert_(lower))}

        return self._load_or_derive("factor", site, ridge, factorise, floor)["factor"]

    def spectrum(self, site: SiteId) -> tuple[Tensor, Tensor]:
        """Return eigenvalues (descending) ``[d_in]`` and eigenvectors ``[d_in, d_in]`` of C, float64."""

        def decompose() -> dict[str, Tensor]:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # two LAPACK threads on busy cores were measured 20x slower
            try:
                values, vectors = torch.linalg.eigh(unpack_triangle(self._triangle(site)))
            finally:
                torch.set_num_threads(threads)
            return {"values": values.flip(0), "vectors": vectors.flip(1)}

        spectrum = self._load_or_derive("spectrum", site, 0.0, decompose)
        return spectrum["values"], spectrum["vectors"]

    def _expert_floor(self, site: SiteId) -> float:
        """Return what is added to the diagonal of an expert's moment: it may have seen few tokens, or none.

        A small part of the mean diagonal over all experts of the layer, so that the moments of busy ones hardly change.
        """
        if site.expert is None:
            return 0.0
        key = ("floor", site.layer)
        if key not in self._memo:
            experts = [other for other in self.sites if other.layer == site.layer and other.expert is not None]
            self._memo[key] = _EXPERT_RIDGE * sum(map(self.mean_square, experts)) / len(experts)
        return self._memo[key]

    def _need_site(self, site: SiteId) -> None:
        self.need(site.layer)
        if site not in self.moments:
            covered = ", ".join(str(other) for other in self.sites if other.layer == site.layer)
            raise StatisticsMismatchError(
                f"no statistics for site {site}; of layer {site.layer} these cover {covered}. They are of a model "
                "with other experts; collect them anew with `kecore stats`"
            )

    def _triangle(self, site: SiteId) -> Tensor:
        """Return the lower triangle of a site's moment, packed; see :mod:`kecore.statistics.triangular`."""
        self._need_site(site)
        if isinstance(self.moments, PackedMoments):
            return self.moments.triangles[site]
        return pack_triangle(self.moments[site])

    def _load_or_derive(
        self, kind: str, site: SiteId, ridge: float, derive: Callable[[], dict[str, Tensor]], floor: float = 0.0
    ) -> dict[str, Tensor]:
        """Return what follows from a moment alone: derived once, stored by content, and memory-mapped from there."""
        key = (kind, site, ridge)
        if key not in self._memo:
            triangle = self._triangle(site)
            if triangle.numel() < _WORTH_STORING**2 // 2:
                self._memo[key] = derive()
            else:
                digest = hashlib.sha256(triangle.numpy().data)
                digest.update(repr((_METHOD, kind, ridge)).encode())
                if floor:
                    digest.update(repr(floor).encode())
                self._memo[key] = load_or_make(f"{kind}s", digest.hexdigest()[:32], kind, derive)
        return self._memo[key]

    def check(self, view: ModelView, identity: Identity | None = None) -> None:
        """Refuse statistics that were collected on other weights.

        Raises:
            StatisticsMismatchError: names the layers and what differs.
        """
        identity = identity or view.identity()
        in_model = {site.id for site in view.sites}
        missing = [site for site in self.sites if site not in in_model]
        if missing:
            raise StatisticsMismatchError(
                f"the statistics cover layers {list(self.layers)}, the model has {len(view.layers)} and no site "
                f"{missing[0]} among them"
            )
        for site, fingerprint in self.base.items():
            difference = fingerprint.differs(identity, view.dtype, weights_below(view, site))
            if difference:
                raise StatisticsMismatchError(
                    f"the statistics of layer {site} were collected on other weights: fingerprint {difference}. "
                    "Collect them anew with `kecore stats`, or load the model they belong to"
                )

    def save(self, path: str | Path) -> Path:
        """Write ``statistics.safetensors`` into a folder (or to a ``.safetensors`` file), atomically."""
        path = Path(path)
        file = path if path.suffix == ".safetensors" else path / STATISTICS
        return write_tensors(file, KIND, self.header(), {f"{site}": self._triangle(site) for site in self.sites})

    def header(self) -> dict[str, Any]:
        """Return what identifies the statistics, as JSON values."""
        base: dict[str, Any] = {}
        for site, weights in self.base.items():
            base[str(site)] = {"dtype": weights.dtype, "digests": dict(weights.digests)}
        return {
            "format": _FORMAT,
            "version": self.version,
            "tokens": self.tokens,
            "corpus": self.corpus,
            "sources": list(self.sources),
            "seed": self.seed,
            "sequence": self.sequence,
            "precision": self.precision,
            "convergence": {str(site): change for site, change in self.convergence.items()},
            "base": base,
            "origins": {str(site): asdict(origin) for site, origin in self.origins.items()},
        }

    @classmethod
    def load(cls, path: str | Path) -> KeyStatistics:
        """Read statistics; those of kecore before it knew sites are named by layers, as a dense layer's site is.

        Args:
            path: a file, a folder, or ``hf:OWNER/NAME[@REVISION]`` on the Hugging Face hub.

        Raises:
            ArtifactError: missing, truncated, corrupt, foreign, or from a newer kecore.
            HubError: the hub cannot be reached, or has no such statistics.
        """
        header, tensors = read_tensors(artifact_file(path, STATISTICS), KIND, newest=_FORMAT)
        with explain_content_errors(path, "file of key statistics"):
            return cls(
                moments=PackedMoments({SiteId.parse(name): triangle for name, triangle in tensors.items()}),
                tokens=header["tokens"],
                base={SiteId.parse(name): Fingerprint(**weights) for name, weights in header["base"].items()},
                corpus=header["corpus"],
                sources=tuple(header["sources"]),
                seed=header["seed"],
                sequence=header["sequence"],
                precision=header.get("precision"),
                convergence={SiteId.parse(name): change for name, change in header["convergence"].items()},
                version=header["version"],
                origins={
                    SiteId.parse(name): MomentOrigin(**origin) for name, origin in header.get("origins", {}).items()
                },
            )


class PackedMoments(Mapping[SiteId, Tensor]):
    """Moments as triangles, often of a mapped file; one is unpacked when asked for, and forgotten when unused."""

    def __init__(self, triangles: dict[SiteId, Tensor]) -> None:
        self.triangles = triangles
        self._unpacked: WeakValueDictionary[SiteId, Tensor] = WeakValueDictionary()

    def __getitem__(self, site: SiteId) -> Tensor:
        moment = self._unpacked.get(site)
        if moment is None:
            moment = self._unpacked[site] = unpack_triangle(self.triangles[site])
        return moment

    def __contains__(self, site: object) -> bool:
        return site in self.triangles

    def __iter__(self) -> Iterator[SiteId]:
        return iter(self.triangles)

    def __len__(self) -> int:
        return len(self.triangles)


def weights_below(view: ModelView, site: SiteId) -> Callable[[str], bool]:
    """Return a function that tells whether the keys at ``site`` depend on the parameter of a name."""
    prefixes_above = tuple(f"{layer.name}." for layer in view.layers[site.layer + 1 :])
    after_layers: set[int] = set()
    for module in (view.final_norm, view.unembedding):
        if module is not None:
            after_layers |= {id(parameter) for parameter in module.parameters()}
    embedding = view.model.get_input_embeddings()  # type: ignore[operator, union-attr]
    after_layers -= {id(parameter) for parameter in embedding.parameters()}  # the unembedding may be tied to it
    skipped = {name for name, parameter in view.model.named_parameters() if id(parameter) in after_layers}
    skipped.add(view.site(site).linear.matrix_name.parameter)  # it reads the keys

    def is_below(name: str) -> bool:
        return name not in skipped and not name.startswith(prefixes_above)

    return is_below
