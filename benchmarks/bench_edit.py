"""How fast kecore edits: facts per second over the number of facts, where the time goes, and peak memory.

    python benchmarks/bench_edit.py --facts FILE --text FILE [--methods rome,memit,alphaedit,ft-m]
        [--counts 1,10,100,1000] [--out docs/performance]

Each method writes the first n facts in one call of `Editor.edit`, from prompts to attached weights; loading and
statistics are not counted. Statistics are timed apart: one pass for five layers against one pass a layer in float32, as
the peers collect them. `--out` gets bench_edit.json, facts_per_second.png and stages.png.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from bench_common import conditions, forget_contexts, peak, reset_peak, scores, statistics_of, warm_up
from torch import Tensor, nn

import kecore
from kecore import Corpus, Editor, KeyStatistics, load_records
from kecore.api.line import MethodLine
from kecore.memory import resident_bytes
from kecore.model import SiteId
from kecore.statistics import collect_statistics

CPU = torch.device("cpu")
BATCH = 8192  # tokens of one pass of the peers' way, padding included


def main() -> None:
    """Parse the command line, run, write the figures."""
    options = parser().parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", kecore.KecoreWarning)
    counts = [int(count) for count in options.counts.split(",")]
    records = list(load_records(options.facts, limit=max(counts)))
    editor = Editor.from_pretrained(options.model, dtype="float32")
    layers = range(len(editor.view.layers) // 2)
    editor.statistics = statistics_of(editor, options.text, layers, options.tokens, options.cache)
    config: dict[str, Any] = {"precision": options.precision} if options.precision else {}
    if options.steps:
        config["steps"] = options.steps
    rows: list[dict[str, Any]] = []
    for method in options.methods.split(","):
        own = config if "precision" in editor_fields(method) else {k: v for k, v in config.items() if k == "steps"}
        warm_up(editor, records[:1], method, **own)
        for count in counts:
            if count <= len(records):
                rows.append(row(editor, method, records[:count], own, options.score))
                show(rows[-1])
    found = {
        "conditions": conditions(editor, options),
        "edits": rows,
        "statistics": collection(editor, options) if options.stat_tokens else None,
    }
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "bench_edit.json").write_text(json.dumps(found, indent=1) + "\n")
        curves(rows, options.out)
    sys.stdout.write(json.dumps(found) + "\n" if options.json else table(found))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="demo")
    made.add_argument("--facts", required=True, type=Path)
    made.add_argument("--text", required=True, type=Path)
    made.add_argument("--methods", default="rome,memit,alphaedit,ft-m")
    made.add_argument("--counts", default="1,10,100,1000")
    made.add_argument("--steps", type=int, default=None)
    made.add_argument("--precision", default=None, help="of the values, such as bfloat16")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--tokens", type=int, default=None, help="of the statistics that the edits use")
    made.add_argument("--stat-tokens", type=int, default=32768, help="that are timed; 0 for none")
    made.add_argument("--cache", type=Path, default=Path("out/statistics"))
    made.add_argument("--score", action="store_true", help="score each edit too")
    made.add_argument("--out", type=Path, default=None)
    made.add_argument("--json", action="store_true")
    return made


def editor_fields(method: str) -> set[str]:
    """Return the keys of a method's configuration."""
    return set(MethodLine.of(method).method.Config.known_keys())


def row(editor: Editor, method: str, records: list[Any], config: dict[str, Any], score: bool) -> dict[str, Any]:
    """One edit, timed."""
    session = Editor(editor.model, editor.encoder.tokenizer, statistics=editor.statistics)  # that has no contexts yet
    forget_contexts()
    measured = reset_peak()
    before = resident_bytes(CPU)
    begin, worked = time.perf_counter(), time.process_time()
    session.edit(records, method, **config)
    seconds, worked = time.perf_counter() - begin, time.process_time() - worked
    most = peak()
    out: dict[str, Any] = {
        "method": method,
        "n": len(records),
        "seconds": round(seconds, 3),
        "processor_seconds": round(worked, 3),  # which other work on the machine hardly changes
        "seconds_per_fact": round(seconds / len(records), 4),
        "facts_per_second": round(len(records) / seconds, 3),
        "stages": {name: round(value, 3) for name, value in session.history[-1].stages.items()},
        "peak_memory_bytes": most if measured else None,
        "added_memory_bytes": most - before if measured else None,
    }
    if score:
        out["scores"] = scores(session.evaluate(records))
    session.revert()
    return out


def collection(editor: Editor, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of the statistics of layers 4 to 8: one pass in each type, and float32 passes for each."""
    corpus = Corpus.of(options.text)
    layers = [i for i in range(4, 9) if i < len(editor.view.layers)] or [0]
    error = difference(editor, corpus, layers[-1])
    precisions = (None, torch.bfloat16)
    found: list[KeyStatistics] = []
    seconds: list[float] = []
    for precision in precisions:
        begin = time.perf_counter()
        found.append(
            collect_statistics(
                editor.view, editor.encoder, corpus, layers, tokens=options.stat_tokens, precision=precision
            )
        )
        seconds.append(time.perf_counter() - begin)
    ours, half = found
    one_pass, rounded = (ours.tokens / each for each in seconds)
    begin = time.perf_counter()
    counts = [per_layer(editor, by_length(editor, corpus, options.stat_tokens), layer)[1] for layer in layers]
    rate = sum(counts) / len(counts) / (time.perf_counter() - begin)
    return {
        "layers": layers,
        "tokens": ours.tokens,
        "one_pass_tokens_per_second": round(one_pass, 1),
        "bfloat16_tokens_per_second": round(rounded, 1),
        "per_layer_tokens_per_second": round(rate, 1),
        "ratio": round(one_pass / rate, 3),
        "bfloat16_ratio": round(rounded / rate, 3),
        "relative_difference": error,
        "bfloat16_difference": max(
            float((half.moment(SiteId(i)) - ours.moment(SiteId(i))).norm() / ours.moment(SiteId(i)).norm())
            for i in layers
        ),
        "convergence": {str(i): round(change, 4) for i, change in ours.convergence.items()},
    }


def difference(editor: Editor, corpus: Corpus, layer: int) -> float:
    """How far both ways are apart on the same rows: passages without padding, packed as kecore packs them."""
    ours = collect_statistics(editor.view, editor.encoder, corpus, [layer], tokens=2048)
    tokenizer, ids = editor.encoder.tokenizer, list[int]()
    for passage in corpus.sample(8 * 2048 // 100, 0).passages:
        ids += [*tokenizer(passage, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    rows = [ids[i : i + ours.sequence] for i in range(0, 2048, ours.sequence)]
    theirs, _ = per_layer(editor, [rows], layer)
    found = float((theirs - ours.moment(SiteId(layer))).norm() / ours.moment(SiteId(layer)).norm())
    if not found < 1e-3:
        raise SystemExit(f"the two ways differ by {found:.1e}")
    return found


def by_length(editor: Editor, corpus: Corpus, tokens: int) -> list[list[list[int]]]:
    """Passages of so many tokens, those of similar length together, as the peers batch them."""
    longest = editor.encoder.max_length
    kept: list[list[int]] = []
    for passage in corpus.sample(tokens // 20, 0).passages:
        kept.append(editor.encoder.tokenizer(passage)["input_ids"][:longest])
        tokens -= len(kept[-1])
        if tokens <= 0:
            break
    batches: list[list[list[int]]] = [[]]
    for ids in sorted(kept, key=len):
        if (len(batches[-1]) + 1) * len(ids) > BATCH:
            batches.append([])
        batches[-1].append(ids)
    return batches


@torch.no_grad()
def per_layer(editor: Editor, batches: Iterable[list[list[int]]], layer: int) -> tuple[Tensor, int]:
    """The second moment as the peers collect it, `M += xᵀ x` in float32 up to one layer, and the number of tokens."""
    view = editor.view
    projection = view.layers[layer].site.linear
    total = torch.zeros(projection.d_in, projection.d_in)
    kept: list[Tensor] = []
    handles = [
        projection.module.register_forward_pre_hook(lambda _m, args: kept.append(args[0])),
        view.layers[layer].module.register_forward_hook(_stop),
    ]
    count = 0
    for batch in batches:
        rows = editor.encoder.rows(batch)
        with suppress(_Stopped):
            view.model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False)
        keys = kept.pop()[rows.attention_mask.bool()].float()
        total += keys.t().mm(keys)
        count += len(keys)
    for handle in handles:
        handle.remove()
    return total.double() / count, count


class _Stopped(Exception):
    """Ends a pass behind the layer that is wanted."""


def _stop(_module: nn.Module, _args: Any, _output: Any) -> None:
    raise _Stopped


def curves(rows: list[dict[str, Any]], out: Path) -> None:
    """Facts per second, added memory and the share of each stage, over the number of facts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for method in methods:
        mine = [row for row in rows if row["method"] == method]
        n = [row["n"] for row in mine]
        axes[0].plot(n, [row["facts_per_second"] for row in mine], marker="o", label=method)
        memory = [(row["n"], row["added_memory_bytes"]) for row in mine if row["added_memory_bytes"] is not None]
        axes[1].plot([x for x, _ in memory], [y / 2**20 for _, y in memory], marker="o", label=method)
    axes[0].set(xlabel="facts in one edit", ylabel="facts per second")
    axes[1].set(xlabel="facts in one edit", ylabel="memory that the edit adds, MiB")
    for axis in axes:
        axis.set_xscale("log")
        axis.set_yscale("log", base=2)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(out / "facts_per_second.png", dpi=120)
    pyplot.close(figure)

    figure, axes = pyplot.subplots(
        1, len(methods), figsize=(3.2 * len(methods), 4), layout="constrained", squeeze=False
    )
    names = list(dict.fromkeys(name for row in rows for name in row["stages"]))
    colors = dict(zip(names, pyplot.get_cmap("tab10").colors, strict=False))
    for axis, method in zip(axes[0], methods, strict=True):
        mine = [row for row in rows if row["method"] == method]
        bottom = [0.0] * len(mine)
        for name in names:
            share = [row["stages"].get(name, 0.0) / row["n"] for row in mine]
            if any(share):
                axis.bar([str(row["n"]) for row in mine], share, bottom=bottom, label=name, color=colors[name])
            bottom = [a + b for a, b in zip(bottom, share, strict=True)]
        axis.set(title=method, xlabel="facts in one edit", ylabel="seconds per fact")
    stages = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    figure.legend(stages, list(colors), loc="outside lower center", ncols=len(colors), frameon=False)
    figure.savefig(out / "stages.png", dpi=120)
    pyplot.close(figure)


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| method | facts | s per fact | facts per s | stages, s | added memory, MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["edits"]:
        stages = ", ".join(f"{name} {value}" for name, value in row["stages"].items())
        memory = "-" if row["added_memory_bytes"] is None else f"{row['added_memory_bytes'] / 2**20:.0f}"
        lines.append(
            f"| {row['method']} | {row['n']} | {row['seconds_per_fact']} | {row['facts_per_second']} | {stages} | "
            f"{memory} |"
        )
    if found["statistics"]:
        lines += ["", "Statistics: " + json.dumps(found["statistics"])]
    return "\n".join(lines) + "\n"


def show(row: dict[str, Any]) -> None:
    """One line of progress."""
    sys.stderr.write(f"{row}\n")


if __name__ == "__main__":
    main()
