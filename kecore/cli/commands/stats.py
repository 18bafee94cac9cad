"""``kecore stats``: key statistics of a model from natural text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kecore.cli import options
from kecore.cli.console import Screen, fields, number, size
from kecore.cli.machine import cost, environment, show_cost
from kecore.cli.session import Loading, StatisticsSource, layers_for, span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kecore.model_view import ModelView
    from kecore.statistics import KeyStatistics

__all__ = ["stats"]

FILE = "statistics.safetensors"


def stats(
    context: typer.Context,
    model: options.Model,
    out: options.Out,
    text: options.Texts = None,
    layers: Annotated[
        str,
        typer.Option(
            metavar="LAYERS",
            help="Layers such as 4,5,6 or 4-8; auto: those that installed methods edit by default.",
        ),
    ] = "auto",
    tokens: options.Tokens = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Collect key statistics from natural text.

    Methods such as MEMIT need them. One pass over the text serves all layers. A run that was interrupted goes on
    where it stopped.
    """
    screen = Screen.of(context)
    asked = options.layer_list(layers)
    if not text:
        raise typer.BadParameter("no text: give --text FILE (`kecore edit` without --stats uses a bundled sample)")
    options.check_free(out, FILE, force)
    from kecore.corpus import Corpus

    corpus = Corpus.of(*text)
    loaded = Loading(model, device, dtype, trust_remote_code, seed).load(screen)
    with screen.stage("read", "reading the model's structure"):
        from kecore.model_view import ModelView
        from kecore.statistics import KeyStatistics
        from kecore.text import Encoder

        view = ModelView.of(loaded.model)
        encoder = Encoder(loaded.tokenizer, max_length=view.max_length)
        chosen = _default_layers(view) if asked is None else [view.layer(index).index for index in asked]
    with screen.stage(
        "statistics", f"key statistics of layers {span(chosen)} from {StatisticsSource(texts=tuple(text)).name}"
    ):
        found = KeyStatistics.collect(
            view, encoder, corpus, chosen, tokens=tokens, seed=seed, out=out, progress=screen.progress
        )
    _finish(screen, found, view, out / FILE, model, chosen)


def _finish(
    screen: Screen, found: KeyStatistics, view: ModelView, path: Path, model: str, layers: Sequence[int]
) -> None:
    worst = max(found.convergence.values(), default=None)
    screen.show(
        fields(
            {
                "statistics": f"{path} ({size(path.stat().st_size)})",
                "layers": span(layers),
                "tokens": f"{found.tokens:,}, {found.tokens / screen.stages['statistics']:,.0f} a second",
                "convergence": f"{number(worst)} (largest change of the inverse from half the tokens to all)",
            }
        )
    )
    spent = cost(screen, view.device)
    show_cost(screen, spent)
    values = {**found.header(), "layers": list(found.layers), "model": model, "path": str(path)}
    screen.finish({**values, **spent, **environment(view.device), "warnings": screen.warnings})


def _default_layers(view: ModelView) -> list[int]:
    """Every layer that some installed method edits by default and wants statistics of."""
    from kecore import registry
    from kecore.errors import PluginError

    chosen: set[int] = set()
    offered = registry.default()
    for name in offered.names():
        try:
            method = offered.get(name)
        except PluginError:
            continue  # `kecore methods` says what is wrong with it
        if method.capabilities.needs_statistics:
            chosen |= set(layers_for(method.Config(), view))
    return sorted(chosen) or list(range(len(view.layers)))
