"""Ratios, a table and charts from a run of ``bench_ops.py``.

    python benchmarks/report_ops.py out/bench.json [--docs docs]

prints how many times faster kecore is than each competitor. ``--docs`` also writes the table into ``docs/ops.md``,
between its marks, and a chart for each operation beside it; that takes matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

MARK = "<!-- benchmark: {} -->"
NAMES = {"native": "kecore", "torch": "torch's best", "peers": "peers' statement"}
COLOURS = {"native": "#0b6e4f", "torch": "#e0a030", "peers": "#8a8d91"}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--docs", type=Path)
    arguments = parser.parse_args()
    run = json.loads(arguments.file.read_text(encoding="utf-8"))
    rows = collected(run)
    sys.stdout.write(table(rows) + "\n")
    if arguments.docs is not None:
        write(arguments.docs / "ops.md", f"{conditions(run)}\n\n{table(rows)}")
        for op in sorted({row["op"] for row in rows}):
            chart(op, [row for row in rows if row["op"] == op], arguments.docs / f"ops_{op.strip('_')}.png")


def collected(run: Row) -> list[Row]:
    """One row a case, with the fastest time of each competitor."""
    rows: dict[tuple[Any, ...], Row] = {}
    for one in run["benchmarks"]:
        info = one["extra_info"]
        key = tuple(info[part] for part in ("op", "dtype", "d", "n"))
        row = rows.setdefault(key, dict(zip(("op", "dtype", "d", "n"), key, strict=True)))
        row[info["competitor"]] = one["stats"]["min"]
        row[f"{info['competitor']} error"] = info["error"]
    return list(rows.values())


def conditions(run: Row) -> str:
    """What the numbers were measured on."""
    info, cpu = run["benchmarks"][0]["extra_info"], run["machine_info"]["cpu"]
    return (
        f"{cpu['brand_raw']}, {info['threads']} threads, kernels: {info['backend']}; {run['datetime'][:10]}, "
        f"commit {run['commit_info']['id'][:10]}{' and changes' * bool(run['commit_info']['dirty'])}. "
        "Fastest of five rounds, of one for the dense solves from d = 8192 on."
    )


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| op | keys | d | n | kecore | torch's best | peers | faster than torch | than peers | error |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        times = [f"{1000 * row[name]:.1f} ms" for name in NAMES]
        ratios = [f"{row[name] / row['native']:.1f} x" for name in ("torch", "peers")]
        cells = [f"`{row['op']}`", row["dtype"], row["d"], row["n"], *times, *ratios, f"{row['native error']:.0e}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def write(page: Path, text: str) -> None:
    begin, end = MARK.format("begin"), MARK.format("end")
    old = page.read_text(encoding="utf-8")
    page.write_text(f"{old.split(begin)[0]}{begin}\n{text}\n{end}{old.split(end)[1]}", encoding="utf-8")


def chart(op: str, rows: list[Row], file: Path) -> None:
    """Times over width, a panel for each kind of keys or size of batch."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    by = "dtype" if op == "second_moment_" else "n"
    panels = list(dict.fromkeys(row[by] for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(3.3 * len(panels) + 0.6, 3.4), sharey=True, squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        chosen = sorted((row for row in rows if row[by] == panel), key=lambda row: row["d"])
        widths = [row["d"] for row in chosen]
        for name, label in NAMES.items():
            times = [row[name] for row in chosen]
            axis.plot(widths, times, marker="o", markersize=4, color=COLOURS[name], label=label, linewidth=1.8)
        last = chosen[-1]
        axis.plot([last["d"]] * 2, [last["native"], last["peers"]], color="#444444", linewidth=0.8, linestyle=":")
        middle = (last["d"], (last["peers"] * last["native"]) ** 0.5)
        ratio = f"{last['peers'] / last['native']:.0f} x"
        axis.annotate(ratio, middle, xytext=(5, 0), textcoords="offset points", va="center", fontweight="bold")
        axis.set_xlim(widths[0] / 1.15, widths[-1] * 1.75)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(widths, [f"{w:,}".replace(",", " ") for w in widths], rotation=45, fontsize=8)
        axis.minorticks_off()
        axis.set_title(f"{panel} keys" if by == "dtype" else f"n = {panel}", fontsize=10)
        axis.set_xlabel("key width d")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("seconds")
    axes[0][0].legend(frameon=False, fontsize=8, loc="upper left")
    titles = {
        "second_moment_": f"Adding {rows[0]['n']} keys to a layer's second moment",
        "kv_solve": "Update for n facts from a cached factor (peers: dense float64 LU)",
    }
    figure.suptitle(titles[op], fontsize=11)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
