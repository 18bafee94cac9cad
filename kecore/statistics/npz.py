"""Key statistics in the field's files: ``model.layers.5.mlp.down_proj_float32_mom2_100000.npz`` and the like.

ROME's ``layer_stats`` writes one file a layer, named by the module whose inputs were summed, and MEMIT, AlphaEdit and
EasyEdit have taken that over. It holds ``mom2.mom2``, the sum of ``k kᵀ``, and ``mom2.count``, the number of keys. What
it does not hold is which weights it was collected on, so
:mod:`kecore.statistics.spot` compares it with keys of the model.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kecore.api.errors import ArtifactError, NonFiniteError, StatisticsMismatchError
from kecore.api.identity import Fingerprint
from kecore.api.progress import Progress, silent
from kecore.corpus import Corpus
from kecore.files import file_digest, write_atomic
from kecore.hub import HubReference, download, is_reference, list_files
from kecore.model import ModelView, SiteId, ValueSite
from kecore.statistics.moments import KeyStatistics, MomentOrigin, PackedMoments, weights_below
from kecore.statistics.spot import BOUND, SCALE_BOUND, SPOT_TOKENS, SpotCheck, spot_check
from kecore.statistics.triangular import pack_triangle, symmetrise_
from kecore.text import Encoder

__all__ = ["SAMPLES", "export_statistics", "find_files", "import_statistics"]

SAMPLES = 100_000
"""Number of samples in the names of exported files: the ``mom2_n_samples`` of the field's configurations, by which its
tools look for a file. How many keys a moment is the mean of stands in the file."""

_SUFFIX = ".npz"
_NAME = re.compile(r"(?P<module>.+?)_(?P<dtype>b?float\d+)_(?P<kinds>[a-z0-9_-]*mom2[a-z0-9-]*)(_t\d+)?(_\d+)?")
_ASYMMETRY = 1e-3  # relative; sums in float32 on a GPU are not symmetric to the last bit


@dataclass(frozen=True, slots=True)
class _Sum:
    """What one file holds.

    Args:
        path: the file.
        matrix: the sum of ``k kᵀ``, ``[d, d]`` in its own type.
        count: how many keys it is the sum of.
    """

    path: Path
    matrix: Tensor
    count: int


def find_files(sources: Sequence[str | Path]) -> list[Path]:
    """Return the ``.npz`` files that are meant; those of the hub are fetched.

    Args:
        sources: files, folders, or ``hf:OWNER/NAME[@REVISION]`` with or without the path of a file or folder.

    Raises:
        ArtifactError: there is no such file, or it is no ``.npz`` file; or a folder holds none.
        HubError: the hub cannot be reached, or has no such repository.
    """
    files: list[Path] = []
    for source in sources:
        candidates = [Path(source)]
        if is_reference(source):
            candidates = _fetch_files(HubReference.parse(source))
        elif Path(source).is_dir():
            candidates = sorted(Path(source).rglob(f"*{_SUFFIX}"))
        if not candidates:
            raise ArtifactError(
                f"{source} holds no {_SUFFIX} files; name those that layer_stats of ROME or EasyEdit wrote"
            )
        files += candidates
    for file in files:
        if not zipfile.is_zipfile(file):
            reason = "is not an .npz file, or it is cut short" if file.exists() else "no such file"
            raise ArtifactError(f"{file}: {reason}; expected one such as model.layers.5.mlp.down_proj_float32_mom2.npz")
    return files


def _fetch_files(reference: HubReference) -> list[Path]:
    """Fetch the ``.npz`` files at a place of a repository, all of one commit."""
    listing = list_files(reference)
    prefix = reference.inside
    names = [name for name in listing.digests if name.endswith(_SUFFIX) and name.startswith(prefix)]
    return [download(reference.at(listing.commit), name) for name in sorted(names)]


def import_statistics(
    view: ModelView,
    encoder: Encoder,
    sources: Sequence[str | Path] | str | Path,
    *,
    text: Corpus | None = None,
    tokens: int = SPOT_TOKENS,
    bound: float = BOUND,
    memory: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> KeyStatistics:
    """Read key statistics that ROME, MEMIT, AlphaEdit or EasyEdit collected, and check that they fit the model.

    Args:
        view: the unedited model.
        encoder: its tokenizer.
        sources: ``.npz`` files, one a layer; or folders or ``hf:`` references of them. A file is matched to a layer by
            the name of the module in its own.
        text: text for :func:`spot_check`, by default the sample that kecore ships.
        tokens: how many tokens of it.
        bound: largest difference of a :class:`kecore.statistics.spot.SpotCheck` that is accepted.
        memory: bytes of activations per pass.
        seed: seeds the choice of passages.
        progress: called with layers read, then with tokens done.

    Returns:
        The statistics, with the names and digests of the files.

    Raises:
        ArtifactError: a file is missing, broken, or no file of moments.
        HubError: the hub cannot be reached, or has no such files.
        NonFiniteError: a moment holds NaN or infinity.
        StatisticsMismatchError: a file is of no layer of the model, of keys of another width, or of another model or
            layer; or two are of one layer.
        DataFormatError: the text cannot be read.
    """
    files = find_files([sources] if isinstance(sources, str | Path) else sources)
    file_by_site = _match_sites(view, files)
    triangles: dict[SiteId, Tensor] = {}
    sums: dict[SiteId, tuple[str, int, str]] = {}
    for number, (site, file) in enumerate(sorted(file_by_site.items())):
        progress("reading", number, len(file_by_site))
        stored = _read_sum(file)
        moment = _make_moment(stored, view.site(site))
        triangles[site] = pack_triangle(moment)
        sums[site] = (file_digest(file), stored.count, str(stored.matrix.dtype).removeprefix("torch."))
    moments = PackedMoments(triangles)
    checks = spot_check(view, encoder, moments, text=text, tokens=tokens, memory=memory, seed=seed, progress=progress)
    _refuse_strangers(file_by_site, checks, bound, tokens)
    origins: dict[SiteId, MomentOrigin] = {}
    for site, (sha256, count, dtype) in sums.items():
        origins[site] = MomentOrigin(
            file=file_by_site[site].name,
            sha256=sha256,
            tokens=count,
            dtype=dtype,
            difference=checks[site].difference,
            scale=checks[site].scale,
        )
    identity = view.identity()
    return KeyStatistics(
        moments=moments,
        tokens=min(origin.tokens for origin in origins.values()),
        base={site: Fingerprint.of(identity, view.dtype, weights_below(view, site)) for site in triangles},
        corpus=hashlib.sha256("".join(origin.sha256 for origin in origins.values()).encode()).hexdigest()[:32],
        sources=tuple(origin.file for origin in origins.values()),
        seed=seed,
        sequence=0,
        origins=origins,
    )


def _match_sites(view: ModelView, files: Sequence[Path]) -> dict[SiteId, Path]:
    """Return the file of each dense layer that has one, by the names of modules.

    Raises:
        StatisticsMismatchError: a file names no such module, or two name one.
    """
    modules = {_module_name(site): site.id for site in view.sites if site.id.expert is None}
    matched: dict[SiteId, Path] = {}
    for file in files:
        match = _NAME.fullmatch(file.stem)
        module = match["module"] if match else file.stem
        sites = [site for name, site in modules.items() if _is_same_module(name, module)]
        if len(sites) != 1:
            example = next(iter(modules), "none: its layers have experts")
            raise StatisticsMismatchError(
                f"{file.name} is of module '{module}', which maps no keys to values in this model; such a module of it "
                f"is called {example}. Name the files of the layers that you want to edit, or load their model"
            )
        (site,) = sites
        if site in matched:
            raise StatisticsMismatchError(
                f"{matched[site]} and {file} are both of layer {site}; name one of them, with the more samples say"
            )
        matched[site] = file
    return matched


def _module_name(site: ValueSite) -> str:
    return site.linear.name.removesuffix(".weight")


def _is_same_module(name: str, other: str) -> bool:
    """Return whether two dotted names end alike: one may lack the outermost modules, which differ between versions."""
    return f".{name}".endswith(f".{other}") or f".{other}".endswith(f".{name}")


def _read_sum(file: Path) -> _Sum:
    """Read a file without unpickling anything.

    Raises:
        ArtifactError: it is broken, or holds no sum of second moments.
    """
    import numpy

    try:
        with numpy.load(file, allow_pickle=False) as arrays:
            names = [name for name in ("mom2.mom2", "mom2") if name in arrays]
            counts = [name for name in ("mom2.count", "count") if name in arrays]
            if not names or not counts:
                raise ArtifactError(
                    f"{file}: expected the arrays mom2.mom2 and mom2.count, got {', '.join(arrays) or 'none'}; these "
                    "are no second moments"
                )
            matrix: Any = arrays[names[0]]
            count = int(arrays[counts[0]])
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{file}: cannot be read ({error}); copy it again") from error
    if count < 1 or matrix.ndim != 2 or matrix.dtype.kind != "f":
        raise ArtifactError(
            f"{file}: expected a matrix of real numbers and a count of at least 1, got {matrix.dtype} of shape "
            f"{tuple(matrix.shape)} and a count of {count}"
        )
    return _Sum(file, torch.from_numpy(matrix), count)


def _make_moment(stored: _Sum, site: ValueSite) -> Tensor:
    """Turn a sum into the mean, ``[d_in, d_in]`` float64, symmetric to the last bit.

    Raises:
        NonFiniteError: it holds NaN or infinity.
        StatisticsMismatchError: its keys have another width than the layer's.
        ArtifactError: no keys have such a second moment.
    """
    width, shape = site.linear.d_in, tuple(stored.matrix.shape)
    if shape != (width, width):
        kind = " (as wide as the outputs of the module)" if shape == (site.linear.d_out,) * 2 else ""
        raise StatisticsMismatchError(
            f"{stored.path.name} is {shape[0]} x {shape[1]}{kind}, the keys of layer {site.id} are {width} wide; it "
            "was collected on another model or module"
        )
    moment = stored.matrix.double().div_(stored.count)
    if not bool(torch.isfinite(moment).all()):
        raise NonFiniteError(f"{stored.path.name} holds NaN or infinity; collect it anew, in float32 or float64")
    asymmetry = float((moment - moment.t()).norm() / moment.norm().clamp_min(1e-300))
    if asymmetry > _ASYMMETRY or bool((moment.diagonal() < 0).any()):
        raise ArtifactError(
            f"{stored.path.name}: no second moment, which is symmetric with a diagonal of squares; it differs from its "
            f"transpose by {asymmetry:.2g} of itself (at most {_ASYMMETRY:g})"
        )
    return symmetrise_(moment.add_(moment.t().clone()).div_(2))


def _refuse_strangers(
    file_by_site: Mapping[SiteId, Path], checks: Mapping[SiteId, SpotCheck], bound: float, tokens: int
) -> None:
    strangers = [site for site, check in checks.items() if not check.holds(bound)]
    if not strangers:
        return
    site = strangers[0]
    check = checks[site]
    raise StatisticsMismatchError(
        f"{file_by_site[site].name} does not fit layer {site} of this model. Over {tokens:,} fresh tokens, 1 minus the "
        f"rank correlation of the neurons' mean squares is {check.difference:.2f} (at most {bound:g}), and their ratio "
        f"is {check.scale:.3g} (from {1 / SCALE_BOUND:g} to {SCALE_BOUND:g}); {len(strangers)} of {len(checks)} files "
        "are refused. It is of another layer, model or kind of text: take the file of this model, give text of its "
        "kind by --text, or collect statistics with `kecore stats MODEL --out DIR`"
    )


def export_statistics(
    statistics: KeyStatistics, view: ModelView, folder: str | Path, *, samples: int = SAMPLES
) -> list[Path]:
    """Write statistics as the ``.npz`` files that ROME, MEMIT, AlphaEdit and EasyEdit read, in float32.

    Args:
        statistics: those of a model.
        view: that model; it gives the names of the modules.
        folder: where to write; the tools look into ``STATS_DIR/MODEL/wikipedia_stats``.
        samples: the number in the names and in the files by which the tools look for them: their ``mom2_n_samples``.

    Returns:
        One file for each dense layer.

    Raises:
        StatisticsMismatchError: the statistics are of another model, or of experts.
        StorageError: the system refuses.
    """
    import numpy

    statistics.check(view)
    written: list[Path] = []
    for site in statistics.sites:
        if site.expert is not None:
            raise StatisticsMismatchError(f"site {site} is an expert, for which the field's tools have no file name")
        moment = statistics.moment(site)
        arrays: dict[str, Any] = {
            "mom2.constructor": "util.runningstats.SecondMoment()",
            "mom2.count": statistics.tokens,
            "mom2.mom2": (moment * statistics.tokens).float().numpy(),
            "sample_size": samples,
        }

        def write(path: Path, arrays: Mapping[str, Any] = arrays) -> None:
            with path.open("wb") as file:  # a name without the suffix would get one
                numpy.savez(file, **arrays)

        name = f"{_module_name(view.site(site))}_float32_mom2_{samples}{_SUFFIX}"
        written.append(write_atomic(Path(folder) / name, write))
    return written
