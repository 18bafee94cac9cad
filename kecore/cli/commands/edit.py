"""``kecore edit``: facts in, an edit file with its scores out."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from kecore.cli import options, verdicts
from kecore.cli.console import Screen, count_noun, format_bytes, make_fields, to_plain_json
from kecore.cli.errors import CheckFailed
from kecore.cli.groups import ReadingOptions, take_groups
from kecore.cli.hparams import take_hparams
from kecore.cli.job import EditJob
from kecore.cli.loading import Loading
from kecore.cli.outcome import Outcome
from kecore.cli.samples import choose_asks
from kecore.hub import EDIT
from kecore.statistics_source import StatisticsSource

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kecore.api.hparams import Hparams
    from kecore.api.line import MethodLine
    from kecore.api.types import EditRecord
    from kecore.edit import WeightEdit
    from kecore.journal import Journal
    from kecore.trained import TrainedEditor

__all__ = ["edit"]

RESULT = "result.json"


@take_groups
def edit(
    context: typer.Context,
    *,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help=f"{options.MODEL_HELP} With --ledger, the ledger's.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Directory for the result; not needed with --ledger.", show_default=False),
    ] = None,
    ledger: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Edit on what this ledger has in effect, and write the edit to it."),
    ] = None,
    with_: Annotated[
        list[Path] | None,
        typer.Option(
            "--with", metavar="EDIT", help="Edit with this earlier edit on MODEL (repeatable).", show_default=False
        ),
    ] = None,
    method: options.Method = "memit",
    facts: options.Facts = None,
    limit: options.Limit = None,
    reading: ReadingOptions,
    prompt: options.Prompt = None,
    subject: options.Subject = None,
    target: options.Target = None,
    ground_truth: options.GroundTruth = None,
    stats: options.Stats = None,
    text: options.Texts = None,
    tokens: options.Tokens = None,
    trained: options.Trained = None,
    examples: options.Examples = None,
    preset: options.Preset = None,
    hparams: options.Hparams = None,
    set_: options.Settings = None,
    no_evaluate: options.NoEvaluate = False,
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCORE=VALUE",
            help="Exit with 1 where a score after the edit is below this, such as strict=0.95 (repeatable).",
            show_default=False,
        ),
    ] = None,
    retry: Annotated[
        bool,
        typer.Option("--retry", help="Edit what failed again, on top and longer; kept if fewer facts fail."),
    ] = False,
    chat: options.Chat = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    memory: options.Memory = "auto",
    trust_remote_code: options.RemoteCode = False,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Edit facts, and write the edit and its scores.

    Give --facts FILE, or one fact by --prompt, --subject and --target. MODEL itself stays as it is.
    """
    screen = Screen.of(context)
    single = {"prompt": prompt, "subject": subject, "target": target, "ground_truth": ground_truth}
    required = verdicts.read_requirements(require)
    if (required or retry) and no_evaluate:
        raise typer.BadParameter(f"--{'require' if required else 'retry'} needs scores; leave out --no-evaluate")
    of_facts = reading.given() if limit is None else ["--limit", *reading.given()]
    _check_usage(facts, single, of_facts, stats, text or tokens)
    theirs = take_hparams(screen, context, hparams, method=method, preset=preset)
    journal = _open_ledger(model, out, ledger, with_)
    job = EditJob(
        method=_method(method if theirs is None else theirs.method),
        records=_single(single) if facts is None else reading.load(facts, limit),
        source=StatisticsSource(stats, tuple(text or ()), tokens),
        preset=preset,
        values={**(theirs.fields if theirs is not None else {}), **options.settings(set_)},
        trained=_trained(trained),
        examples=_examples(examples),
        evaluate=not no_evaluate,
        retry=retry,
    )
    # Whatever is wrong with the input is said before the model is loaded.
    job.check()
    budget = options.byte_count(memory)
    if out is not None:
        options.check_free(out, EDIT, force)
    earlier = _earlier_edits(with_ or ())
    loading = Loading(model or (journal.model if journal is not None else ""), device, dtype, trust_remote_code, seed)
    editor = loading.edit(
        screen, statistics=job.source, trained=job.trained or (), examples=job.examples, chat=chat, memory=budget
    )
    if theirs is None:
        job.suggest_presets(screen, editor)
    if journal is not None:
        with screen.stage("attach", f"putting on what {ledger} has in effect"):
            editor.follow(journal)
    elif earlier:
        with screen.stage("attach", f"putting on {count_noun(len(earlier), 'earlier edit')}"):
            editor.resume(earlier)
    outcome = job.run(screen, editor, out, choose_asks(job.records))
    _finish(screen, outcome, loading, out, facts, hparams=theirs, ledger=ledger, earlier=with_ or ())
    if required and outcome.after is not None and (missed := verdicts.unmet(required, outcome.after)):
        raise CheckFailed("; ".join(missed))


def _open_ledger(
    model: str | None, out: Path | None, ledger: Path | None, earlier: Sequence[Path] | None
) -> Journal | None:
    """Open the ledger that is named, and refuse options that lack a part or contradict each other.

    Raises:
        ArtifactError: there is no ledger, or it is damaged.
    """
    if ledger is None:
        if model is None:
            raise typer.BadParameter("no model: name MODEL, or a ledger by --ledger")
        if out is None:
            raise typer.BadParameter("no place for the result: name a directory by --out, or a ledger by --ledger")
        return None
    if earlier:
        raise typer.BadParameter("a ledger knows its earlier edits; leave out --with, or --ledger")
    from kecore.journal import open_journal

    return open_journal(ledger)


def _earlier_edits(paths: Sequence[Path]) -> list[WeightEdit]:
    """Read the edits of ``--with``.

    Raises:
        ArtifactError: one cannot be read, or changes no weights.
    """
    if not paths:
        return []
    from kecore.checkpoint import NamedEdit

    return [NamedEdit.read(path).edit for path in paths]


def _check_usage(
    facts: Path | None,
    single: Mapping[str, str | None],
    of_facts: Sequence[str],
    stats: Path | None,
    collect: object,
) -> None:
    """Refuse options that contradict each other, and a fact that lacks a part."""
    single_options = [f"--{name.replace('_', '-')}" for name, value in single.items() if value is not None]
    if facts is not None and single_options:
        raise typer.BadParameter(f"give either --facts or a single fact, not --facts and {single_options[0]}")
    if facts is None:
        missing = [f"--{name}" for name in ("prompt", "subject", "target") if single[name] is None]
        if not single_options:
            raise typer.BadParameter("no facts: give --facts FILE, or one fact by --prompt, --subject and --target")
        if missing:
            raise typer.BadParameter(f"a single fact needs {', '.join(missing)} too")
        if of_facts:
            raise typer.BadParameter(f"{of_facts[0]} goes with --facts FILE")
    if stats is not None and collect:
        raise typer.BadParameter("--stats are read as they are; leave out --text and --tokens, or --stats")


def _method(name: str) -> MethodLine:
    from kecore.api.line import MethodLine

    return MethodLine.of(name)


def _trained(path: Path | None) -> TrainedEditor | None:
    if path is None:
        return None
    from kecore.trained import TrainedEditor

    return TrainedEditor.load(path)


def _examples(path: Path | None) -> Sequence[EditRecord]:
    if path is None:
        return ()
    from kecore.evaluate import load_records

    return load_records(path)


def _single(parts: Mapping[str, str | None]) -> Sequence[EditRecord]:
    from kecore.api.types import EditRecord, EditRequest

    return [EditRecord(EditRequest(**{name: value or "" for name, value in parts.items()}))]


def _finish(
    screen: Screen,
    outcome: Outcome,
    loading: Loading,
    out: Path | None,
    facts: Path | None,
    *,
    hparams: Hparams | None,
    ledger: Path | None,
    earlier: Sequence[Path],
) -> None:
    """Write the result file, print the result, and say what can be done with it."""
    from kecore.files import write_json

    edit = outcome.editor.history[-1].edit
    values = {**outcome.to_json(screen, loading.ref), "facts": facts, "edit_id": edit.id}
    written = {"edit": f"{outcome.path} ({format_bytes(outcome.path.stat().st_size)})", "id": edit.id}
    if hparams is not None:
        values["hparams"] = hparams.to_json()
    journal = outcome.editor.journal
    if journal is not None:
        values |= {"ledger": ledger, "state": journal.state}
        written |= {"ledger": f"{ledger}, state {journal.state}"}
    if out is not None:
        result = out / RESULT
        values |= {"result_path": result}
        write_json(result, to_plain_json({**values, "records": outcome.rows()}))
        written |= {"result": str(result)}
        if outcome.after is not None:
            written["verdicts"] = str(verdicts.write_verdicts(out / verdicts.FILE, outcome.verdicts))
    outcome.show(screen)
    screen.show(make_fields(written))
    if ledger is not None:
        name = quote(str(ledger))
        commands = [f"kecore log {name}", f"kecore verify {name}", f"kecore revert {name} {edit.id}"]
    else:
        commands = _next_commands(loading.ref, str(out), outcome, earlier)
    screen.commands("Next", *commands)
    kind = outcome.job.method.capabilities.kind
    if kind != "weights":
        what = "texts before prompts" if kind == "prompt" else "modules beside the model"
        name = outcome.job.method.name
        screen.log(f"'{name}' writes {what} and no weights, so `kecore attach` and `kecore export` cannot carry it")
    screen.finish(values)


def _next_commands(model: str, out: str, outcome: Outcome, earlier: Sequence[Path]) -> list[str]:
    """Return what can be done with the edit: nothing that is refused for an edit of its kind."""
    name, folder = quote(model), quote(out)
    chat = " --chat" if outcome.editor.encoder.chat else ""
    edits = [*(quote(str(path)) for path in earlier), folder]
    options_ = " ".join(f"--edit {edit}" for edit in edits)
    commands = [
        f"kecore chat {name} {options_}{chat}",
        f"kecore inspect {folder}",
        f"kecore checkup {name} {options_}",
    ]
    if outcome.job.method.capabilities.kind == "weights":
        commands.append(f"kecore attach {name} {' '.join(edits)} --out edited-model")
        if not earlier:
            commands.append(f"kecore export {folder} --to merged --out served")
    return commands
