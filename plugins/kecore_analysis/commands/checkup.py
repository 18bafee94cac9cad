"""``kecore checkup``: what edits did to a model beside their facts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kecore.cli import options
from kecore.cli.console import Screen, count_noun, format_bytes, format_score, make_fields, make_table
from kecore.cli.loading import Loading
from kecore.cli.machine import measure_cost, show_cost
from kecore.cli.plugins import help_group
from kecore.environment import environment

if TYPE_CHECKING:
    from kecore.checkpoint import Attached
    from kecore.edit import Edit
    from kecore.editor import Editor
    from kecore_analysis.examination import Examination, SideEffects
    from kecore_analysis.health import Change, MatrixHealth

__all__ = ["checkup"]

_FIGURES = {"perplexity": ("perplexity", 2), "drift": ("drift (KL, nats)", 4), "agreement": ("next-token agreement", 3)}
"""Name to what people read, and to how many decimals."""

_CHANCE = "chance is what guessing gives: a task that stands there tells nothing of what an edit spoils.\n"


@help_group("Measure")
def checkup(
    context: typer.Context,
    model: options.Model,
    edits: options.Edits = None,
    each: Annotated[
        bool, typer.Option("--each", help="Examine each edit by itself, instead of all of them together.")
    ] = False,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="FILE...",
            help="Held-out text: .txt, .json or .jsonl, plain or .gz, or hf:NAME[:CONFIG[:SPLIT]].",
            show_default="kecore's Wikipedia sample",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Unrelated prompts, one a line.", show_default="the first words of passages of --text"
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="A task set of docs/metrics.md: a file named after its task, NAME=FILE, or a folder (repeatable); "
            "needs `pip install 'kecore[eval]'`.",
            show_default=False,
        ),
    ] = None,
    harness: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="Tasks of lm-eval; needs `pip install 'kecore[eval]'`.")
    ] = None,
    harness_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with further tasks of lm-eval.")
    ] = None,
    without: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME", help="Parts to leave out: perplexity, drift, matrices or latency."),
    ] = None,
    limit: Annotated[
        int, typer.Option(metavar="N", help="Most passages, prompts, and items of each task.", min=1)
    ] = 100,
    window: Annotated[int, typer.Option(metavar="N", help="Most tokens of a passage.", min=2)] = 256,
    chat: options.Chat = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    memory: options.Memory = "auto",
    trust_remote_code: options.RemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Show what edits did to MODEL beside their facts.

    Perplexity of held-out text, drift on unrelated prompts, accuracy on tasks, the edited matrices, and seconds a
    token: before, after, and the difference with its paired 95 % confidence interval. MODEL may be a checkpoint of
    `kecore attach`; without --edit its own edits are examined.
    """
    screen = Screen.of(context)
    from kecore.checkpoint import read_record

    record = None if edits else read_record(model)
    if record is not None and dtype != "auto":
        raise typer.BadParameter(f"{model} carries edits, so its weights keep their type; leave out --dtype")
    edit_by_source = _load_edits(edits or [], record)
    groups = [edit_by_source]
    if each:
        groups = [{source: edit} for source, edit in edit_by_source.items()]
    budget = options.byte_count(memory)
    from kecore_analysis.examination import Examination

    examination = Examination.read(
        text=text or (),
        prompts=prompts,
        tasks=task or (),
        harness=options.names(harness),
        harness_folder=harness_folder,
        without=options.names(without),
        limit=limit,
        window=window,
        seed=seed,
    )
    editor = _open_editor(screen, Loading(model, device, dtype, trust_remote_code, seed), record, chat, budget)
    identity = editor.view.identity()
    for edit in edit_by_source.values():
        edit.check_base(editor.model, identity)  # before anything is asked
    _warn_of_prompts(screen, edit_by_source, examination)
    effects = _examine_groups(screen, editor, examination, groups, identity)
    _finish(screen, editor, examination, effects, model)


def _load_edits(paths: Sequence[Path], record: Attached | None) -> dict[str, Edit]:
    """Load the edits to be examined, by where they came from."""
    from kecore.edit import load_edit

    if record is not None:
        return {f"{item.source} ({number})": item.edit for number, item in enumerate(record.load_edits(), 1)}
    if not paths:
        raise typer.BadParameter("no edits: give --edit EDIT, or a checkpoint that `kecore attach` wrote")
    edit_by_source = {str(path): load_edit(path) for path in paths}
    if len(edit_by_source) < len(paths):
        raise typer.BadParameter("an edit is given twice by --edit")
    return edit_by_source


def _open_editor(screen: Screen, loading: Loading, record: Attached | None, chat: bool, memory: int | None) -> Editor:
    """Open a session on the unedited model."""
    loaded = loading.load(screen)
    if record is not None:
        with screen.stage("restore", f"finding the base of {loading.ref}"):
            record.restore(loaded.model)
    with screen.stage("read", "reading the model's structure and fingerprint"):
        from kecore.editor import Editor

        progress = screen.progress
        return Editor(loaded.model, loaded.tokenizer, chat=chat, seed=loading.seed, memory=memory, progress=progress)


def _warn_of_prompts(screen: Screen, edit_by_source: dict[str, Edit], examination: Examination) -> None:
    """Say what cannot see an edit that acts on prompts."""
    from kecore.edit import PromptEdit

    names = [name for name, edit in edit_by_source.items() if isinstance(edit, PromptEdit)]
    if names and (examination.passages or examination.harness):
        screen.warn(
            f"{', '.join(names)} changes prompts, which perplexity and tasks of lm-eval do not go through: they show "
            "no change whatever it does"
        )


def _examine_groups(
    screen: Screen, editor: Editor, examination: Examination, groups: Sequence[dict[str, Edit]], identity: Any
) -> dict[str, SideEffects]:
    """Examine what each group of edits did, by the names of its edits."""
    from kecore_analysis.examination import examine

    view, encoder = editor.view, editor.encoder
    batch_tokens = editor.batch_tokens
    with screen.stage("before", "examining the unedited model"):
        before = examination.take(view, encoder, batch_tokens=batch_tokens, progress=screen.progress)
    effects: dict[str, SideEffects] = {}
    for group in groups:
        label = " + ".join(group)
        with screen.stage("after", f"examining it with {label}"):
            effects[label] = examine(
                view,
                encoder,
                [*group.values()],
                before,
                examination,
                base=identity,
                batch_tokens=batch_tokens,
                progress=screen.progress,
            )
        _warn_of_collapse(screen, label, effects[label].changes, len(examination.prompts))
    return effects


def _warn_of_collapse(screen: Screen, label: str, changes: Mapping[str, Change], prompts: int) -> None:
    """Say where the edited model gives no numbers."""
    if "perplexity" in changes and not math.isfinite(changes["perplexity"].after):
        screen.warn(f"{label}: the perplexity after the edit is not finite")
    finite = changes["drift"].items if "drift" in changes else 0
    if finite < prompts:
        screen.warn(
            f"{label}: on {prompts - finite} of {prompts} prompts the drift is not finite; it is the mean of the others"
        )


def _finish(
    screen: Screen, editor: Editor, examination: Examination, effects: Mapping[str, SideEffects], model: str
) -> None:
    """Print the result."""
    conditions = examination.conditions(editor.encoder)
    chances = {name: values["chance"] for name, values in conditions["tasks"].items()}
    for label, of_group in effects.items():
        _show_effects(screen, label, of_group, chances)
    screen.show(
        f"[dim]Conditions {conditions['hash']}: {conditions['form']} prompts, {editor.base.dtype} weights, "
        f"seed {editor.seed}.\n"
        "± is half of the paired 95 % confidence interval of the difference; * marks differences larger than that.\n"
        f"{_CHANCE if chances else ''}[/]"
    )
    cost = measure_cost(screen, editor.view.device)
    show_cost(screen, cost)
    screen.finish(
        {
            "model": model,
            "results": [{"label": label, **of_group.to_json()} for label, of_group in effects.items()],
            "conditions": conditions,
            "sources": examination.sources,
            "seed": editor.seed,
            "dtype": editor.base.dtype,
            "device": str(editor.view.device),
            "base": dict(editor.base.digests),
            **cost,
            **environment(editor.view.device),
            "warnings": screen.warnings,
        }
    )


def _show_effects(screen: Screen, label: str, effects: SideEffects, chances: Mapping[str, float | None]) -> None:
    """Print what one group of edits did."""
    has_figures = any(name in effects.changes for name in _FIGURES)
    screen.show(_figures_table(label, effects) if has_figures else f"Side effects of {label}")
    if effects.changes.keys() - _FIGURES.keys():
        screen.show(_tasks_table(effects, chances))
    if effects.matrices:
        screen.show(_matrices_table(effects.matrices))
    edits: list[str] = []
    for edit in effects.edits:
        facts, size = count_noun(edit["facts"], "fact"), format_bytes(edit["bytes"])
        edits.append(f"{facts} by {edit['method']}, {size}")
    fields = {"edits": "; ".join(edits)}
    if effects.latency is not None:
        base, edited = 1000 * effects.latency.base, 1000 * effects.latency.edited
        fields["latency"] = f"{edited:.1f} ms a token, {base:.1f} ms without"
    screen.show(make_fields(fields), "")


def _figures_table(label: str, effects: SideEffects) -> Any:
    """Return the table of perplexity, drift and agreement before and after."""
    rows: list[list[str]] = []
    for name, (words, digits) in _FIGURES.items():
        if name in effects.changes:
            rows.append([words, *_row(effects.changes[name], digits)])
    headers = ("", "before", "after", "difference", "± (95 %)", "n")
    return make_table(*headers, rows=rows, title=f"Side effects of {label}", right=range(1, len(headers)))


def _tasks_table(effects: SideEffects, chances: Mapping[str, float | None]) -> Any:
    """Return the table of accuracies; kecore's own tasks with what guessing gives, and F1 where it is defined."""
    rows: list[list[str]] = []
    for name, change in effects.changes.items():
        if name not in _FIGURES:
            chance = format_score(chances[name]) if name in chances else ""
            rows.append([name, *_row(change, 3), chance, _arrow(effects.f1.get(name, ()))])
    headers = ("task", "before", "after", "difference", "± (95 %)", "n", "chance", "F1")
    return make_table(*headers, rows=rows, title="Tasks", right=range(1, len(headers)))


def _row(change: Change, digits: int) -> list[str]:
    """Write a figure before and after, the difference, half of its interval, and the number of items."""
    half_width, mark = "", " "
    if change.half_width is not None:
        half_width = f"{change.half_width:.{digits}f}"
        mark = "*" if abs(change.difference) > change.half_width else " "
    return [
        f"{change.before:.{digits}f}",
        f"{change.after:.{digits}f}",
        f"{change.difference:+.{digits}f}{mark}",
        half_width,
        str(change.items),
    ]


def _matrices_table(matrices: Sequence[MatrixHealth]) -> Any:
    """Return the table of edited matrices, each figure before and after."""
    rows: list[list[str]] = []
    for matrix in matrices:
        pairs = (matrix.norm, matrix.spectral, matrix.stable_rank, matrix.condition)
        rows.append([matrix.name, f"{100 * matrix.change:.2f} %", *map(_arrow, pairs)])
    headers = ("matrix", "change", "norm", "spectral norm", "stable rank", "condition")
    return make_table(*headers, rows=rows, title="Edited matrices", right=range(1, len(headers)))


def _arrow(pair: Sequence[float]) -> str:
    return " → ".join(f"{value:.3g}" for value in pair)
