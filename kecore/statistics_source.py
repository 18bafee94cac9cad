"""Where a session takes the key statistics from that a method reads: a file, kecore's cache, or a text."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kecore import data
from kecore._version import __version__
from kecore.api.errors import ArtifactError, KecoreWarning, PluginError, StatisticsMismatchError
from kecore.api.progress import STAGES
from kecore.corpus import Corpus
from kecore.hub import STATISTICS, artifact_file

# kecore.statistics is imported by the functions that compute: with torch it takes seconds, and a source is also made
# by commands that end before a model is loaded.
if TYPE_CHECKING:
    from kecore.api.identity import Fingerprint
    from kecore.editor import Editor
    from kecore.memory import Need
    from kecore.model import ModelView
    from kecore.statistics import KeyStatistics

__all__ = ["Provision", "StatisticsSource", "default_layers", "log_provision"]

_CACHED_BYTES = 8  # of each number of a moment: four in the statistics, four in a factor


@dataclass(frozen=True, slots=True)
class Provision:
    """How the statistics of a text come about, known before the work begins.

    Args:
        layers: the layers that they cover.
        tokens: how many tokens they are of; where they are still to be collected, at most so many.
        folder: where the cache keeps them.
        cached: they were collected before and have been read.
        seconds: how long it takes to collect them, about; 0 where they were collected before.
        bytes: what they and their factors will take in the cache; 0 likewise.
    """

    layers: tuple[int, ...]
    tokens: int
    folder: Path
    cached: bool
    seconds: float = 0.0
    bytes: int = 0


def log_provision(provision: Provision) -> None:
    """Say in the log how statistics come about."""
    logger = logging.getLogger(STAGES)
    if provision.cached:
        logger.info("key statistics were collected before: %s", provision.folder)
    else:
        logger.info(
            "collecting key statistics of %d layers from %d tokens, about %.0f s; kept in %s",
            len(provision.layers), provision.tokens, provision.seconds, provision.folder,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class StatisticsSource:
    """Where key statistics come from.

    Args:
        saved: a file or folder of ``kecore stats``, or ``hf:OWNER/NAME[@REVISION]``, which is fetched when it is
            checked or read; None to collect them from text.
        texts: texts to collect them from, once for each model; by default the sample that kecore ships.
        tokens: how many tokens of them; by default by the key's width.
    """

    saved: Path | None = None
    texts: tuple[str, ...] = ()
    tokens: int | None = None

    @property
    def text_name(self) -> str:
        """The texts in words."""
        if not self.texts:
            return "kecore's Wikipedia sample"
        if len(self.texts) == 1:
            return Path(self.texts[0]).name
        return f"{len(self.texts)} texts"

    def check(self) -> None:
        """Refuse files that are not there, before a model is loaded.

        Raises:
            HubError: the hub cannot be reached, or has no such statistics.
            ArtifactError: there are no such statistics.
            DataFormatError: there is no such text.
        """
        if self.saved is None:
            self.corpus()
        elif not artifact_file(self.saved, STATISTICS).exists():
            raise ArtifactError(
                f"key statistics {self.saved}: no such file or directory; make them with `kecore stats`, or leave "
                "them out and they are collected from text"
            )

    def needs(self, view: ModelView, layers: Sequence[int]) -> list[Need]:
        """Say what :meth:`provide` takes in memory where the statistics are not in the cache."""
        if self.saved is not None or not layers:
            return []
        from kecore.statistics import collection_need

        return [collection_need(view, layers, self._token_count(view))]

    def provide(
        self, editor: Editor, layers: Sequence[int], announce: Callable[[Provision], None] = log_provision
    ) -> KeyStatistics:
        """Read the statistics of these layers from the file or the cache, or collect them from the text.

        The cache is keyed by the weights, the text, the layers, the number of tokens and the seed, so it never holds
        statistics of another model or text.

        Args:
            editor: the session; its model is without edits meanwhile.
            layers: what they have to cover.
            announce: called once it is known whether the text has to be run through the model.

        Raises:
            StatisticsMismatchError: the file does not cover a layer.
            ArtifactError: the file cannot be read.
            DataFormatError: the text cannot be read.
            MemoryBudgetError: the session's budget cannot hold the collection.
        """
        if self.saved is not None:
            return self._read_saved(self.saved, layers)
        from kecore.cache import mark_used, trim_cache
        from kecore.files import cache_dir
        from kecore.forecast import forecast_seconds, measure_pace
        from kecore.statistics import collect_statistics, sample_text

        chosen, tokens = tuple(sorted(layers)), self._token_count(editor.view)
        sample = sample_text(self.corpus(), tokens, editor.seed)
        folder = _cache_folder(editor.base, sample.digest, chosen, tokens, editor.seed)
        cached = _read_cache(folder)
        if cached is not None:
            mark_used(folder)
            announce(Provision(chosen, cached.tokens, folder, cached=True))
            return cached
        needs = self.needs(editor.view, chosen)
        plan = editor.memory_plan(needs)
        squares = sum(site.linear.d_in**2 for layer in chosen for site in editor.view.layer(layer).sites)
        seconds = forecast_seconds(measure_pace(editor.view), needs) or 0.0
        announce(Provision(chosen, tokens, folder, False, seconds, bytes=_CACHED_BYTES * squares))
        statistics = collect_statistics(
            editor.view,
            editor.encoder,
            sample,
            chosen,
            tokens=tokens,
            memory=plan.activations,
            out=folder,
            progress=editor.progress,
        )
        trim_cache(cache_dir())
        return statistics

    def corpus(self) -> Corpus:
        """Return the texts; no model is asked about them yet.

        Raises:
            DataFormatError: there is no such text.
        """
        return Corpus.of(*(self.texts or (data.path(data.TEXT),)))

    def _token_count(self, view: ModelView) -> int:
        from kecore.statistics import token_budget

        return self.tokens or token_budget(view)

    @staticmethod
    def _read_saved(path: Path, layers: Sequence[int]) -> KeyStatistics:
        from kecore.statistics import KeyStatistics

        statistics = KeyStatistics.load(path)
        if not set(layers) <= set(statistics.layers):
            raise StatisticsMismatchError(
                f"{path} covers layers {_listed(statistics.layers)}, the method edits {_listed(layers)}; collect those "
                f"with `kecore stats MODEL --layers {','.join(map(str, layers))} --text FILE --out DIR`"
            )
        return statistics


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _cache_folder(base: Fingerprint, digest: str, layers: Sequence[int], tokens: int, seed: int) -> Path:
    """Return the place of these statistics in the cache, which follows from everything that they depend on."""
    weights = {"dtype": base.dtype, **base.digests}
    identity = [weights, digest, list(layers), tokens, seed, __version__]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    from kecore.files import cache_dir

    return cache_dir() / "statistics" / key[:24]


def _read_cache(folder: Path) -> KeyStatistics | None:
    from kecore.statistics import KeyStatistics

    if not (folder / STATISTICS).is_file():
        return None
    try:
        return KeyStatistics.load(folder)
    except ArtifactError as error:
        warnings.warn(
            f"cached key statistics cannot be read and are collected anew: {error}", KecoreWarning, stacklevel=2
        )
        return None


def default_layers(view: ModelView) -> list[int]:
    """Return every layer whose key statistics some installed method reads by default, or all where none does."""
    from kecore.api.registry import default_registry
    from kecore.api.requirements import statistics_layers

    layers: set[int] = set()
    offered = default_registry()
    for name in offered.names():
        try:
            method = offered.get(name)
        except PluginError:
            continue  # `kecore methods` says what is wrong with it
        layers |= set(statistics_layers(method, method.Config(), view))
    return sorted(layers) or list(range(len(view.layers)))
