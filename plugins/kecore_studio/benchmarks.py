"""Reads a store of benchmark results for the page: tables, and curves over the number of edits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kecore.api.errors import ArtifactError

__all__ = ["find_stores", "read_store"]

_DEEPEST = 3
_MOST = 50


def find_stores(folder: Path) -> list[str]:
    """Return stores below a folder, those that were written last first."""
    found: list[Path] = []
    for depth in range(_DEEPEST + 1):
        found += folder.glob("/".join(["*"] * depth + ["*.sqlite"]))
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return [str(path) for path in found[:_MOST]]


def read_store(path: Path) -> dict[str, Any]:
    """Return what a store holds, as JSON values.

    Returns:
        ``path``; ``protocol``; ``tables``, each with its columns and rows; ``curves``, scores over the number of facts.

    Raises:
        ArtifactError: the file is not there, or is no store, or holds no results yet.
    """
    from kecore_bench.report import results, tables
    from kecore_bench.report.figures import curves
    from kecore_bench.report.table import last_moments
    from kecore_bench.store import Store

    with Store(path) as store:
        runs = results(store)
        if not runs:
            raise ArtifactError(f"{path} holds no results yet; let `kecore bench` finish its first run")
        last = last_moments(tables(runs))
        groups: dict[tuple[object, ...], list[Any]] = {}
        for run in runs:
            groups.setdefault((run.spec.group, run.protocol.hash()), []).append(run)
        return {
            "path": str(path),
            "protocol": {**store.protocol.to_json(), "hash": store.protocol.hash()},
            "tables": [_table_to_json(table) for table in last],
            "curves": [_curve_to_json(curve) for group in groups.values() for curve in curves(group)],
        }


def _table_to_json(table: Any) -> dict[str, Any]:
    columns = [{"key": key, "heading": table.heading(key)} for key in table.columns if table.shows(key)]
    values = table.to_json()
    for row, row_values in zip(table.rows, values["rows"], strict=True):
        row_values["note"] = row.note
    return {**values, "title": table.title, "columns": columns}


def _curve_to_json(curve: Any) -> dict[str, Any]:
    lines: list[dict[str, Any]] = []
    for line in curve.lines:
        points = [{"facts": point.facts, **point.score.to_json()} for point in line.points]
        lines.append({"label": line.label, "points": points})
    return {"y": curve.y, "lines": lines, "ticks": curve.ticks}
