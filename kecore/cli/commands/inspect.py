"""``kecore inspect``: what a file or folder of kecore's holds, without loading a model."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from kecore.api.errors import ArtifactError
from kecore.checkpoint import Attached, read_record
from kecore.cli import options
from kecore.cli.commands.train import curve_table
from kecore.cli.console import Screen, format_bytes, format_score, make_fields, make_table
from kecore.cli.loading import span

__all__ = ["inspect"]

_FILES = ("edit.safetensors", "statistics.safetensors", "trained.safetensors")
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
    if diff is not None:
        _differences(screen, path, diff)
        return
    record = read_record(path)
    if record is not None:
        _checkpoint(screen, record)
        return
    file, kind = _kind(path)
    if kind == "key-statistics":
        _statistics(screen, file)
    elif kind == "trained-editor":
        _trained(screen, file)
    else:
        _edit(screen, file)


def _kind(path: Path) -> tuple[Path, str]:
    """The file that ``path`` leads to, and what it says it holds."""
    from kecore.files import read_kind

    file = path
    if path.is_dir():
        found = [path / name for name in _FILES if (path / name).is_file()]
        if not found:
            raise ArtifactError(
                f"{path} holds no edit, no key statistics and no record of edits; `kecore probe` looks at plain models"
            )
        file = found[0]
    return file, read_kind(file, "edit, key statistics or checkpoint")


def _edit(screen: Screen, file: Path) -> None:
    from kecore.edit import load_edit

    edit = load_edit(file)
    values: dict[str, Any] = {"kind": "edit", "path": str(file), **edit.inspect()}
    result = _result_beside(file)
    screen.show(
        make_fields(
            {
                "edit": f"{file} ({format_bytes(file.stat().st_size)})",
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
        screen.show(
            make_fields(
                {"effect": values["effect"], **{key: f"{value!s:.80}" for key, value in values["settings"].items()}}
            )
        )
        rows = [(name, _shape(shape)) for name, shape in values["tensors"].items()]
        screen.show(make_table("tensor", "shape", rows=rows, title="Tensors", right=(1,)))
    facts = [(r.id, r.text, r.target, r.ground_truth or "") for r in edit.requests[:_SHOWN]]
    screen.show(make_table("id", "prompt", "target", "instead of", rows=facts, title="Facts"))
    if len(edit.requests) > _SHOWN:
        screen.show(f"and {len(edit.requests) - _SHOWN} more; --json lists all")
    if result is not None and result.get("scores"):
        scores = [
            (key, format_score(result["scores_before"].get(key)), format_score(value))
            for key, value in result["scores"].items()
        ]
        screen.show(make_table("score", "before", "after", rows=scores, title="Scores, from result.json", right=(1, 2)))
    scored = {key: (result or {}).get(key) for key in ("scores_before", "scores")}
    screen.finish({**values, **scored})


def _shape(sizes: list[int]) -> str:
    return " x ".join(map(str, sizes))


def _result_beside(file: Path) -> dict[str, Any] | None:
    """What ``kecore edit`` wrote about this very edit."""
    path = file.parent / "result.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(values, dict) and Path(str(values.get("edit_path"))).name == file.name
    return values if same else None


def _statistics(screen: Screen, file: Path) -> None:
    from kecore.statistics import KeyStatistics

    found = KeyStatistics.load(file)
    layers = {
        str(layer): {
            "width": found.width(layer),
            "convergence": found.convergence.get(layer),
            "mean_diagonal": found.mean_square(layer),
        }
        for layer in found.layers
    }
    screen.show(
        make_fields(
            {
                "statistics": f"{file} ({format_bytes(file.stat().st_size)})",
                "layers": span(found.layers),
                "tokens": f"{found.tokens:,}, in rows of {found.sequence}",
                "text": ", ".join(found.sources),
                "text digest": found.corpus,
                "made by": f"kecore {found.version}, seed {found.seed}",
            }
        )
    )
    rows = [
        (layer, str(x["width"]), f"{x['mean_diagonal']:.4g}", format_score(x["convergence"]))
        for layer, x in layers.items()
    ]
    title = "Convergence: change of the inverse from half the tokens to all"
    screen.show(
        make_table("layer", "width", "mean of diagonal", "convergence", rows=rows, title=title, right=(1, 2, 3))
    )
    screen.finish({"kind": "statistics", "path": str(file), **found.header(), "layers": layers})


def _trained(screen: Screen, file: Path) -> None:
    from kecore.trained import TrainedEditor

    found = TrainedEditor.load(file)
    values = found.inspect()
    record, schedule = found.record, found.record["schedule"]
    screen.show(
        make_fields(
            {
                "trained editor": f"{file} ({format_bytes(file.stat().st_size)}), {values['numbers']:,} numbers",
                "method": found.method,
                "model": ", ".join(f"{name} {value}" for name, value in found.model.items()),
                "data": f"{record['records']} records, digest {record['data']}",
                "training": f"{schedule['steps']} steps of {schedule['batch_size']}, {record['seconds']:.0f} s",
                "made by": f"kecore {found.version}, seed {found.seed}",
            }
        ),
        curve_table(found),
    )
    screen.finish({"kind": "trained-editor", "path": str(file), **values})


def _checkpoint(screen: Screen, record: Attached) -> None:
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
        (str(place), item["method"], str(len(item["requests"])), item["requests"][0] if item["requests"] else "")
        for place, item in enumerate(record.edits, 1)
    ]
    screen.show(make_table("edit", "method", "facts", "the first", rows=rows, title="Edits", right=(0, 2)))
    screen.commands("To take them off", f"kecore revert {quote(str(record.folder))} --out DIR")
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


def _differences(screen: Screen, path: Path, other: Path) -> None:
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
    shown = [f"{r['prompt'].replace('{}', r['subject'])} {r['target']}" for r in requests[:_SHOWN]]
    more = [f"and {len(requests) - _SHOWN} more"] if len(requests) > _SHOWN else []
    return "; ".join(shown + more) or "none"
