"""Opens models for the commands that run one, and shows how a session gets its key statistics.

Heavy modules are imported inside the functions, so that ``kecore --help`` stays quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kecore.cli.console import Screen, format_bytes, format_estimate

if TYPE_CHECKING:
    from kecore.api.line import MethodLine
    from kecore.editor import Editor
    from kecore.models import LoadedModel
    from kecore.statistics_source import Provision, StatisticsSource

__all__ = ["Loading", "provide_statistics", "span"]


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
        """Load the model and its tokenizer; see :func:`kecore.load_model`."""
        with screen.stage("load", f"loading {self.ref}", bar=False):  # a download shows its own
            return self.load_quietly()

    def load_quietly(self) -> LoadedModel:
        """Load the model and its tokenizer without a stage of their own."""
        import torch

        from kecore.models import load_model

        torch.manual_seed(self.seed)
        return load_model(self.ref, device=self.device, dtype=self.dtype, trust_remote_code=self.trust_remote_code)

    def edit(self, screen: Screen, **options: Any) -> Editor:
        """Open a session on the model with the same seed; ``options`` are those of :class:`kecore.Editor`."""
        loaded = self.load(screen)
        with screen.stage("read", "reading the model's structure and fingerprint"):
            from kecore.editor import Editor

            return Editor(loaded.model, loaded.tokenizer, seed=self.seed, progress=screen.progress, **options)


def provide_statistics(
    screen: Screen, editor: Editor, method: MethodLine, layers: Sequence[int], source: StatisticsSource
) -> None:
    """Get the key statistics that an edit reads, and show how they come about.

    Args:
        screen: shows it.
        editor: a session whose statistics are ``source``.
        method: the method, for a warning where it reads none.
        layers: the layers that they have to cover.
        source: what the command was given.

    Raises:
        StatisticsMismatchError: those given are of other weights, or do not cover a layer.
        ArtifactError: those given cannot be read.
    """
    if not layers:
        if source.saved is not None or source.texts:
            screen.warn(f"method '{method.name}' uses no key statistics; those given are not read")
        return
    text = f"key statistics of layers {span(layers)} from {source.text_name}"
    if source.saved is not None:
        text = f"reading key statistics from {source.saved}"

    def announce(provision: Provision) -> None:
        if provision.cached:
            screen.log(f"key statistics were collected before, from {provision.tokens:,} tokens: {provision.folder}")
        else:
            screen.log(
                f"collecting them in one pass over {provision.tokens:,} tokens, about "
                f"{format_estimate(provision.seconds)}; they will take {format_bytes(provision.bytes)} of "
                f"{provision.folder.parent.parent} and serve every later edit of this model"
            )

    with screen.stage("statistics", text):
        editor.provide_statistics(layers, announce)


def span(layers: Sequence[int]) -> str:
    """Write layers in words: ``4 to 8``, or a list where there are gaps."""
    ordered = sorted(layers)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered))
