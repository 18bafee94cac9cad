"""What the commands that run a model share: opening it, and finding key statistics for it.

Heavy modules are imported inside the functions, so that ``kecore --help`` stays quick.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kecore._version import __version__
from kecore.api.errors import ArtifactError, StatisticsMismatchError
from kecore.cli.console import Screen

if TYPE_CHECKING:
    from kecore.api.method import EditMethod
    from kecore.editor import Editor
    from kecore.memory import Need
    from kecore.model import ModelView
    from kecore.models import LoadedModel
    from kecore.statistics import KeyStatistics, collect_statistics

__all__ = ["Loading", "StatisticsSource", "collected", "layers_for", "provide_statistics", "span", "statistics_needs"]

SAMPLE = "wikipedia_sample.jsonl.gz"
"""The bundled text that statistics are collected from where nobody names another."""


@dataclass(frozen=True, slots=True)
class Loading:
    """How to load a model.

    Args:
        ref: hub id, directory, ``.gguf`` file or ``demo``.
        device: as :func:`kecore.load_model` takes it.
        dtype: as :func:`kecore.load_model` takes it.
        trust_remote_code: run code that comes with the model.
        seed: seeds torch before anything else runs.
    """

    ref: str
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    seed: int = 0

    def load(self, screen: Screen) -> LoadedModel:
        """The model and its tokenizer; see :func:`kecore.load_model`."""
        with screen.stage("load", f"loading {self.ref}", bar=False):  # a download shows its own
            return self.load_quietly()

    def load_quietly(self) -> LoadedModel:
        """The same without a stage of its own."""
        import torch

        from kecore.models import load_model

        torch.manual_seed(self.seed)
        return load_model(self.ref, device=self.device, dtype=self.dtype, trust_remote_code=self.trust_remote_code)

    def edit(self, screen: Screen, **options: Any) -> Editor:
        """An editing session on the model with the same seed; ``options`` are those of :class:`kecore.Editor`."""
        loaded = self.load(screen)
        with screen.stage("read", "reading the model's structure and fingerprint"):
            from kecore.editor import Editor

            return Editor(loaded.model, loaded.tokenizer, seed=self.seed, progress=screen.progress, **options)


@dataclass(frozen=True, slots=True)
class StatisticsSource:
    """Where key statistics come from.

    Args:
        saved: a file or folder of ``kecore stats``.
        texts: texts to collect them from, once for each model; by default the sample that kecore ships.
        tokens: how many tokens of them; by default by the key's width.
    """

    saved: Path | None = None
    texts: tuple[str, ...] = ()
    tokens: int | None = None

    @property
    def name(self) -> str:
        """The texts in words."""
        if not self.texts:
            return "kecore's Wikipedia sample"
        return Path(self.texts[0]).name if len(self.texts) == 1 else f"{len(self.texts)} texts"

    def check(self) -> None:
        """Refuse files that are not there, before a model is loaded.

        Raises:
            ArtifactError: there are no such statistics.
            DataFormatError: there is no such text.
        """
        if self.saved is not None and not self.saved.exists():
            raise ArtifactError(f"--stats {self.saved}: no such file or directory; make it with `kecore stats`")
        if self.texts:
            from kecore.corpus import Corpus

            Corpus.of(*self.texts)


def layers_for(config: Any, view: ModelView) -> list[int]:
    """Layers that a method with this configuration edits; all where the configuration does not tell."""
    chosen = getattr(config, "edited_layers", None)
    return sorted(chosen(view)) if chosen is not None else list(range(len(view.layers)))


def statistics_needs(editor: Editor, method: type[EditMethod], config: Any, source: StatisticsSource) -> list[Need]:
    """What :func:`provide_statistics` takes in memory if the statistics are not in the cache."""
    from kecore.statistics import collection_need, token_budget

    if source.saved is not None or not method.capabilities.needs_statistics:
        return []
    return [collection_need(editor.view, layers_for(config, editor.view), source.tokens or token_budget(editor.view))]


def provide_statistics(
    screen: Screen, editor: Editor, method: type[EditMethod], config: Any, source: StatisticsSource
) -> None:
    """Give the editor the key statistics that a method needs.

    Raises:
        StatisticsMismatchError: the given ones are of other weights, or cover no edited layer.
        ArtifactError: the given ones cannot be read.
    """
    if not method.capabilities.needs_statistics:
        if source.saved is not None or source.texts:
            screen.warn(f"method '{method.name}' uses no key statistics; those given are not read")
        return
    wanted = layers_for(config, editor.view)
    if source.saved is None:
        editor.statistics = collected(screen, editor, wanted, source)
        return
    from kecore.statistics import KeyStatistics

    with screen.stage("statistics", f"reading key statistics from {source.saved}"):
        found = KeyStatistics.load(source.saved)
        editor.statistics = found
    if not set(found.layers) & set(wanted):
        raise StatisticsMismatchError(
            f"{source.saved} covers layers {span(found.layers)}, the method edits {span(wanted)}; collect those with "
            f"`kecore stats MODEL --layers {','.join(map(str, wanted))} --text FILE --out DIR`"
        )


def collected(screen: Screen, editor: Editor, layers: Sequence[int], source: StatisticsSource) -> KeyStatistics:
    """Statistics of the unedited model from texts; read from the cache where the same were collected before.

    The cache is keyed by the weights, the text, the layers and the number of tokens, so it never holds
    statistics of another model or text; what is read is checked against the weights all the same.
    """
    from kecore import data
    from kecore.corpus import Corpus
    from kecore.statistics import collection_need, token_budget

    corpus = Corpus.of(*(source.texts or (data.path(SAMPLE),)))
    tokens = source.tokens or token_budget(editor.view)
    with screen.stage("statistics", f"key statistics of layers {span(layers)} from {source.name}"):
        folder = _cache_folder(editor, corpus.sample(1, editor.seed)[1], layers, tokens)
        found = _cached(screen, folder)
        if found is None:
            screen.log(f"collecting them in one pass over {tokens:,} tokens; kept in {folder}")
            plan = editor.memory_plan([collection_need(editor.view, layers, tokens)])
            found = collect_statistics(
                editor.view, editor.encoder, corpus, layers, tokens=tokens,
                seed=editor.seed, memory=plan.activations, out=folder, progress=screen.progress,
            )  # fmt: skip
        return found


def _cached(screen: Screen, folder: Path) -> KeyStatistics | None:
    from kecore.statistics import KeyStatistics

    if not (folder / "statistics.safetensors").is_file():
        return None
    try:
        found = KeyStatistics.load(folder)
    except ArtifactError as error:
        screen.warn(f"cached key statistics cannot be read and are collected anew: {error}")
        return None
    screen.log(f"they were collected before, from {found.tokens:,} tokens: {folder}")
    return found


def _cache_folder(editor: Editor, corpus: str, layers: Sequence[int], tokens: int) -> Path:
    from kecore.models import cache_dir

    base = {"dtype": editor.base.dtype, **editor.base.digests}
    identity = [base, corpus, sorted(layers), tokens, editor.seed, __version__]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "statistics" / digest[:24]


def span(layers: Sequence[int]) -> str:
    """Layers in words: ``4 to 8``, or a list where there are gaps."""
    ordered = sorted(layers)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered))
