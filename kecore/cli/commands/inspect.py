"""``kecore inspect``: what a file or folder of kecore's holds, without loading a model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kecore.cli import options
from kecore.cli.commands.train import curve_table
from kecore.cli.console import Screen, format_bytes, format_score, make_fields, make_table
from kecore.cli.loading import span

if TYPE_CHECKING:
    from kecore.checkpoint import Attached

__all__ = ["inspect"]

_SHOWN = 10  # requests, before "and so on"


def inspect(
    context: typer.Context,
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="An edit, key statistics, or a checkpoint with edits.", show_default=False),
    ],
    diff: Annotated[
        Path | None, typer.Option(metavar="EDIT", help="Another edit; show how it differs from PATH.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what an edit, statistics or a checkpoint holds."""
    screen = Screen.of(context)
    from kecore.checkpoint import read_record
    from kecore.files import read_kind
    from kecore.sharing import find_artifact

    if diff is not None:
        _show_differences(screen, path, diff)
        return
    record = read_record(path)
    if record is not None:
        _show_checkpoint(screen, record)
        return
    file = find_artifact(path)
    kind = read_kind(file, "edit, key statistics or checkpoint")
    if kind == "key-statistics":
        _show_statistics(screen, file)
    elif kind == "trained-editor":
        _show_trained(screen, file)
    else:
        _show_edit(screen, file)


def _show_edit(screen: Screen, file: Path) -> None:
    from kecore.edit import load_edit
    from kecore.sharing import read_result

    edit = load_edit(file)
    values: dict[str, Any] = {"kind": "edit", "path": str(file), **edit.inspect()}
    result = read_result(file) or {}
    screen.show(
        make_fields(
            {
                "edit": f"{file} ({format_bytes(file.stat().st_size)})",
                "id": edit.id,
                "method": f"{edit.method} (kecore {edit.version})",
                "made": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(edit.created)),
                "base": f"{edit.base.digests.get(edit.base.dtype, '?')[:12]}, {edit.base.dtype}",
                "seed": str(edit.seed),
                "facts": str(len(edit.requests)),
                "config": ", ".join(f"{key}={value}" for key, value in edit.config.items()),
            }
        )
    )
    if "updates" in values:
        rows = [
            (name, _shape(update["shape"]), str(update["rank"]), f"{update['norm']:.4g}")
            for name, update in values["updates"].items()
        ]
        screen.show(make_table("parameter", "shape", "rank", "norm", rows=rows, title="Updates", right=(1, 2, 3)))
    else:
        settings = {key: f"{value!s:.80}" for key, value in values["settings"].items()}
        screen.show(make_fields({"effect": values["effect"], **settings}))
        rows = [(name, _shape(shape)) for name, shape in values["tensors"].items()]
        screen.show(make_table("tensor", "shape", rows=rows, title="Tensors", right=(1,)))
    facts = [(r.id, r.text, r.target, r.ground_truth or "") for r in edit.requests[:_SHOWN]]
    screen.show(make_table("id", "prompt", "target", "instead of", rows=facts, title="Facts"))
    if len(edit.requests) > _SHOWN:
        screen.show(f"and {len(edit.requests) - _SHOWN} more; --json lists all")
    if result.get("scores"):
        before = result["scores_before"]
        rows = [(key, format_score(before.get(key)), format_score(value)) for key, value in result["scores"].items()]
        screen.show(make_table("score", "before", "after", rows=rows, title="Scores, from result.json", right=(1, 2)))
    scores = {"scores_before": result.get("scores_before"), "scores": result.get("scores")}
    screen.finish({**values, **scores})


def _shape(sizes: list[int]) -> str:
    return " x ".join(map(str, sizes))


def _show_statistics(screen: Screen, file: Path) -> None:
    from kecore.statistics import KeyStatistics

    statistics = KeyStatistics.load(file)
    layers = {
        str(site): {
            "width": statistics.width(site),
            "convergence": statistics.convergence.get(site),
            "mean_diagonal": statistics.mean_square(site),
        }
        for site in statistics.sites
    }
    rows_in_words = f", in rows of {statistics.sequence}" if statistics.sequence else ""
    screen.show(
        make_fields(
            {
                "statistics": f"{file} ({format_bytes(file.stat().st_size)})",
                "layers": span(statistics.layers),
                "tokens": f"{statistics.tokens:,}{rows_in_words}",
                "text": ", ".join(statistics.sources),
                "text digest": statistics.corpus,
                "made by": f"kecore {statistics.version}, seed {statistics.seed}",
            }
        )
    )
    rows = [
        (layer, str(figures["width"]), f"{figures['mean_diagonal']:.4g}", format_score(figures["convergence"]))
        for layer, figures in layers.items()
    ]
    title = "Convergence: change of the inverse from half the tokens to all"
    screen.show(
        make_table("layer", "width", "mean of diagonal", "convergence", rows=rows, title=title, right=(1, 2, 3))
    )
    if statistics.origins:
        figures = [
            (str(site), f"{origin.tokens:,}", origin.dtype, f"{origin.difference:.3f}", origin.sha256[:12])
            for site, origin in statistics.origins.items()
        ]
        headers = ("layer", "keys", "type", "difference", "sha256")
        screen.show(make_table(*headers, rows=figures, title="Imported", right=(1, 3)))
    screen.finish({"kind": "statistics", "path": str(file), **statistics.header(), "layers": layers})


def _show_trained(screen: Screen, file: Path) -> None:
    from kecore.trained import TrainedEditor

    trained = TrainedEditor.load(file)
    values = trained.inspect()
    record, schedule = trained.record, trained.record["schedule"]
    screen.show(
        make_fields(
            {
                "trained editor": f"{file} ({format_bytes(file.stat().st_size)}), {values['numbers']:,} numbers",
                "method": trained.method,
                "model": ", ".join(f"{name} {value}" for name, value in trained.model.items()),
                "data": f"{record['records']} records, digest {record['data']}",
                "training": f"{schedule['steps']} steps of {schedule['batch_size']}, {record['seconds']:.0f} s",
                "made by": f"kecore {trained.version}, seed {trained.seed}",
            }
        ),
        curve_table(trained),
    )
    screen.finish({"kind": "trained-editor", "path": str(file), **values})


def _show_checkpoint(screen: Screen, record: Attached) -> None:
    screen.show(
        make_fields(
            {
                "checkpoint": str(record.folder),
                "base": f"{record.model} ({record.base[:12]})",
                "with edits": record.edited[:12],
            }
        )
    )
    rows = [
        (
            str(number),
            edit.get("id", ""),
            edit["method"],
            str(len(edit["requests"])),
            edit["requests"][0] if edit["requests"] else "",
        )
        for number, edit in enumerate(record.edits, 1)
    ]
    screen.show(make_table("edit", "id", "method", "facts", "the first", rows=rows, title="Edits", right=(0, 3)))
    folder = quote(str(record.folder))
    commands = [f"kecore revert {folder} --out DIR"]
    if len(record.edits) > 1 and "id" in record.edits[0]:
        commands.append(f"kecore revert {folder} {record.edits[0]['id']} --out DIR")
    screen.commands("To take them off", *commands)
    screen.finish(
        {
            "kind": "checkpoint",
            "path": str(record.folder),
            "model": record.model,
            "base": record.base,
            "edited": record.edited,
            "edits": list(record.edits),
        }
    )


def _show_differences(screen: Screen, path: Path, other: Path) -> None:
    from kecore.edit import load_edit

    values = load_edit(path).diff(load_edit(other))
    screen.show(
        make_fields(
            {
                "methods": " and ".join(values["methods"]),
                "same base": "yes" if values["same_base"] else "no",
                f"only in {path}": _facts(values["only_in_first"]),
                f"only in {other}": _facts(values["only_in_second"]),
            }
        )
    )
    rows = [(name, *_distance(update)) for name, update in values.get("updates", {}).items()]
    screen.show(make_table("parameter", "distance", "cosine", rows=rows, title="Updates", right=(1, 2)))
    screen.finish({"kind": "diff", "first": str(path), "second": str(other), **values})


def _distance(update: Mapping[str, Any]) -> tuple[str, str]:
    if "only_in" in update:
        return f"only in the {update['only_in']}", ""
    return f"{update['distance']:.4g}", f"{update['cosine']:.4f}"


def _facts(requests: list[dict[str, Any]]) -> str:
    facts = [f"{r['prompt'].replace('{}', r['subject'])} {r['target']}" for r in requests[:_SHOWN]]
    if len(requests) > _SHOWN:
        facts.append(f"and {len(requests) - _SHOWN} more")
    return "; ".join(facts) or "none"
