"""``kecore stats``: key statistics of a model from natural text."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from kecore.api.errors import ArtifactError
from kecore.cli import options
from kecore.cli.console import (
    Screen,
    count_noun,
    format_bytes,
    format_estimate,
    format_score,
    make_fields,
    make_table,
)
from kecore.cli.loading import Loading, span
from kecore.cli.machine import measure_cost, show_cost, show_plans
from kecore.environment import environment
from kecore.hub import STATISTICS
from kecore.statistics_source import StatisticsSource, default_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kecore.model import ModelView
    from kecore.statistics import KeyStatistics

__all__ = ["stats"]

_PRECISIONS = ("model", "float32", "bfloat16", "float16")


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
    until: Annotated[
        float | None,
        typer.Option(
            metavar="CHANGE",
            help="Stop at a half, a quarter, ... of --tokens once the convergence figure is at most this (0.2, say).",
            show_default=False,
        ),
    ] = None,
    import_: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            metavar="FILE.npz...",
            help="Do not collect: take what ROME, MEMIT, AlphaEdit or EasyEdit collected for MODEL (files, folders, "
            "or hf:OWNER/NAME), after a check against keys of MODEL on --tokens tokens of --text.",
            show_default=False,
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="STATS",
            help="Do not collect: write these key statistics of MODEL as the .npz files that those tools read.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help="Type that the model runs in: model (its own), float32, bfloat16 or float16; sums stay float64.",
        ),
    ] = "model",
    memory: options.Memory = "auto",
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Collect key statistics from natural text.

    Methods such as MEMIT need them. Without --text they are of a small Wikipedia sample that kecore ships. One pass
    over the text serves all layers. A run that was interrupted goes on where it stopped.
    """
    screen = Screen.of(context)
    indices = options.layer_list(layers)
    if until is not None and not until > 0:
        raise typer.BadParameter("--until is a relative change and must be above 0")
    if precision not in _PRECISIONS:
        raise typer.BadParameter(f"--precision is one of {', '.join(_PRECISIONS)}, not {precision!r}")
    options.check_free(out, STATISTICS, force)
    loading = Loading(model, device, dtype, trust_remote_code, seed)
    if import_ or export is not None:
        if import_ and export is not None:
            raise typer.BadParameter("give either --import or --export")
        if indices is not None or until is not None or precision != "model":
            raise typer.BadParameter("--layers, --until and --precision are for collecting; leave them out")
        if export is not None:
            _export(screen, loading, export, out, force)
        else:
            _import(screen, loading, import_ or [], StatisticsSource(texts=tuple(text or ()), tokens=tokens), out)
        return
    budget = options.byte_count(memory)
    source = StatisticsSource(texts=tuple(text or ()))
    corpus = source.corpus()
    loaded = loading.load(screen)
    with screen.stage("read", "reading the model's structure"):
        from kecore.api.identity import DTYPES
        from kecore.forecast import forecast_seconds, measure_pace
        from kecore.memory import make_plan
        from kecore.model import ModelView
        from kecore.statistics import collect_statistics, collection_need, token_budget
        from kecore.text import Encoder

        view = ModelView.of(loaded.model)
        encoder = Encoder(loaded.tokenizer, max_length=view.max_length, handover=view.handover_ids)
        chosen = default_layers(view) if indices is None else [view.layer(index).index for index in indices]
    wanted = tokens or token_budget(view)
    dtype_of_pass = DTYPES.get(precision)
    plan = make_plan(view, budget, [collection_need(view, chosen, wanted, dtype_of_pass)])
    show_plans(screen, [plan], asked=budget is not None)
    seconds = forecast_seconds(measure_pace(view), plan.needs)
    if seconds is not None:
        screen.log(f"time: about {format_estimate(seconds)} for {wanted:,} tokens")
    seen: list[int] = []  # tokens done, the first of them before this run

    def progress(stage: str, done: int, total: int) -> None:
        seen.append(done)
        screen.progress(stage, done, total)

    with screen.stage("statistics", f"key statistics of layers {span(chosen)} from {source.text_name}"):
        statistics = collect_statistics(
            view, encoder, corpus, chosen, tokens=wanted,
            until=until, seed=seed, precision=dtype_of_pass, memory=plan.activations, out=out, progress=progress,
        )  # fmt: skip
    rate = (statistics.tokens - seen[0]) / screen.stages["statistics"]
    _finish(screen, statistics, view, out / STATISTICS, model, rate)


def _import(screen: Screen, loading: Loading, sources: Sequence[str], source: StatisticsSource, out: Path) -> None:
    """Read the field's files, compare them with the model, and write them as kecore's own."""
    from kecore.statistics.npz import find_files

    with screen.stage("find", "looking for the files"):
        files = find_files(sources)
    corpus = source.corpus()
    loaded = loading.load(screen)
    with screen.stage("read", "reading the model's structure"):
        from kecore.model import ModelView
        from kecore.statistics import import_statistics
        from kecore.statistics.spot import BOUND, SPOT_TOKENS
        from kecore.text import Encoder

        view = ModelView.of(loaded.model)
        encoder = Encoder(loaded.tokenizer, max_length=view.max_length, handover=view.handover_ids)
    tokens = source.tokens or SPOT_TOKENS
    with screen.stage("import", f"comparing {count_noun(len(files), 'file')} with keys of the model"):
        statistics = import_statistics(
            view, encoder, files, text=corpus, tokens=tokens, seed=loading.seed, progress=screen.progress
        )
        path = statistics.save(out)
    rows: list[tuple[str, ...]] = []
    for site, origin in statistics.origins.items():
        figures = (f"{origin.tokens:,}", origin.dtype, f"{origin.difference:.3f}", f"{origin.scale:.3f}")
        rows.append((str(site), origin.file, *figures))
    screen.show(make_fields({"statistics": f"{path} ({format_bytes(path.stat().st_size)})"}))
    title = f"Compared over {tokens:,} tokens; a difference of at most {BOUND:g} is accepted"
    headers = ("layer", "file", "keys", "type", "difference", "scale")
    screen.show(make_table(*headers, rows=rows, title=title, right=(2, 4, 5)))
    screen.commands("Next", f"kecore edit {quote(loading.ref)} --stats {quote(str(out))} --facts FILE --out DIR")
    values = {**statistics.header(), "layers": list(statistics.layers), "model": loading.ref, "path": str(path)}
    screen.finish({**values, **measure_cost(screen, view.device), "warnings": screen.warnings})


def _export(screen: Screen, loading: Loading, saved: Path, out: Path, force: bool) -> None:
    """Write kecore's statistics as the field's files."""
    if not force and any(out.glob("*.npz")):
        raise ArtifactError(f"{out} holds .npz files; choose another --out, or overwrite them with --force")
    from kecore.statistics import KeyStatistics

    with screen.stage("statistics", f"reading {saved}"):
        statistics = KeyStatistics.load(saved)
    loaded = loading.load(screen)
    with screen.stage("read", "reading the model's structure"):
        from kecore.model import ModelView
        from kecore.statistics import export_statistics
        from kecore.statistics.npz import SAMPLES

        view = ModelView.of(loaded.model)
    with screen.stage("export", f"writing {count_noun(len(statistics.sites), 'file')}"):
        files = export_statistics(statistics, view, out)
    rows = [(file.name, format_bytes(file.stat().st_size)) for file in files]
    screen.show(make_table("file", "size", rows=rows, right=(1,)))
    screen.show(
        "ROME, MEMIT, AlphaEdit and EasyEdit find them in STATS_DIR/MODEL/wikipedia_stats, with "
        f"mom2_n_samples {SAMPLES}."
    )
    screen.finish({"model": loading.ref, "statistics": saved, "files": files, "warnings": screen.warnings})


def _finish(screen: Screen, statistics: KeyStatistics, view: ModelView, path: Path, model: str, rate: float) -> None:
    worst = max(statistics.convergence.values(), default=None)
    screen.show(
        make_fields(
            {
                "statistics": f"{path} ({format_bytes(path.stat().st_size)})",
                "layers": span(statistics.layers),
                "tokens": f"{statistics.tokens:,}, {rate:,.0f} a second through all layers at once",
                "convergence": f"{format_score(worst)} (largest change of the inverse from half the tokens to all)",
            }
        )
    )
    spent = measure_cost(screen, view.device)
    show_cost(screen, spent)
    values = {
        **statistics.header(),
        "layers": list(statistics.layers),
        "model": model,
        "path": str(path),
        "tokens_per_second": rate,
    }
    screen.finish({**values, **spent, **environment(view.device), "warnings": screen.warnings})
