"""``kecore attach`` and ``kecore revert`` put edits into a checkpoint and take them out again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kecore.cli import options
from kecore.cli.console import Screen, count_noun, make_fields, make_table
from kecore.cli.loading import Loading
from kecore.cli.machine import measure_cost, show_cost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from kecore.checkpoint import Written
    from kecore.editor import Editor
    from kecore.journal import Withdrawal

__all__ = ["attach", "revert"]


def attach(
    context: typer.Context,
    model: options.Model,
    edits: Annotated[list[Path], typer.Argument(metavar="EDIT", help="Edit files or folders.", show_default=False)],
    out: options.Out,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Write MODEL with edits on it as a checkpoint.

    Any program that reads Hugging Face checkpoints can load --out. It also carries what `kecore revert` needs.
    MODEL may itself be such a checkpoint: its edits stay, and new ones join them, whether they were made for the same
    base or for the edited checkpoint.
    """
    screen = Screen.of(context)
    from kecore.checkpoint import NamedEdit, attach_edits, read_record
    from kecore.files import check_new_folder

    check_new_folder(out)
    named = [NamedEdit.read(path) for path in edits]
    if read_record(model) is not None and dtype != "auto":
        raise typer.BadParameter(f"{model} carries edits, so its weights keep their type; leave out --dtype")
    loaded = Loading(model, device, dtype, trust_remote_code, seed).load(screen)
    written = attach_edits(loaded, named, out, show=screen.stage)
    _report(screen, loaded.model, written)


def revert(
    context: typer.Context,
    *,
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A checkpoint that `kecore attach` wrote, or a ledger.", show_default=False),
    ],
    ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="ID", help="Only these edits, by the beginnings of their ids.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Directory for what is left of a checkpoint.", show_default=False),
    ] = None,
    number: Annotated[
        list[int] | None,
        typer.Option(
            "--edit",
            metavar="NUMBER",
            help="Of a checkpoint, only this edit (repeatable); `kecore inspect CHECKPOINT` numbers them.",
            show_default="all",
        ),
    ] = None,
    fact: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Of a ledger's edit, only this fact (repeatable).", show_default=False),
    ] = None,
    keep_later: Annotated[
        bool, typer.Option("--keep-later", help="Of a ledger, plan no later edit anew; no model is loaded.")
    ] = False,
    stats: options.Stats = None,
    chat: options.Chat = False,
    device: options.Device = "auto",
    memory: options.Memory = "auto",
    trust_remote_code: options.RemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Take edits off a checkpoint or a ledger, any of them.

    From a checkpoint they come off bit for bit, which is proven by fingerprint; one that was changed since is left
    alone. In a ledger, edits that were planned later are planned anew where they were planned with those that go.
    """
    screen = Screen.of(context)
    from kecore.journal import find_journal

    journal = find_journal(folder)
    if journal is None:
        if out is None:
            raise typer.BadParameter("a checkpoint is never changed in place: name a directory for the result by --out")
        if fact or keep_later:
            raise typer.BadParameter(f"{folder} is no ledger, and --fact and --keep-later are for ledgers")
        _revert_checkpoint(screen, folder, ids or (), number or (), out, Loading(str(folder), device))
        return
    if not ids or number or out is not None:
        raise typer.BadParameter(f"{folder} is a ledger: name edits by their ids, without --edit and --out")
    if fact and keep_later:
        raise typer.BadParameter("a fact of a batch is taken back by planning the others anew; leave out --keep-later")

    def open_session() -> Editor:
        loading = Loading(journal.model, device, "auto", trust_remote_code)
        return loading.edit(screen, statistics=stats or "auto", chat=chat, memory=options.byte_count(memory))

    withdrawal = journal.revert(ids) if keep_later else journal.take_back(ids, open_session, facts=fact or ())
    _report_withdrawal(screen, withdrawal)


def _revert_checkpoint(
    screen: Screen, folder: Path, ids: Sequence[str], numbers: Sequence[int], out: Path, loading: Loading
) -> None:
    """Take edits off a checkpoint, and write what is left."""
    from kecore.checkpoint import need_record, take_off_edits
    from kecore.files import check_new_folder

    check_new_folder(out)
    record = need_record(folder)
    removed = record.check_numbers([*numbers, *record.numbers_of(ids)])
    loaded = loading.load(screen)
    written = take_off_edits(loaded, out, removed, show=screen.stage)
    if written.edits:
        taken = ", ".join(str(record.edits[number - 1].get("id", number)) for number in removed)
        screen.show(f"Taken off: {taken}; {count_noun(len(written.edits), 'edit')} stay on '{record.model}'.")
    else:
        screen.show(f"The base weights of '{record.model}' are back, bit for bit (fingerprint {record.base[:12]}).")
    _report(screen, loaded.model, written, taken_off=removed)


def _report_withdrawal(screen: Screen, withdrawal: Withdrawal) -> None:
    """Say what taking edits back from a ledger meant."""
    if withdrawal.replaced:
        how = f"as if never made: {count_noun(len(withdrawal.replaced), 'edit')} planned anew"
    elif withdrawal.later:
        how = f"{count_noun(len(withdrawal.later), 'later edit')} stay as planned with it"
    else:
        how = "exact: nothing in effect was planned with it"
    screen.show(make_fields({"taken back": ", ".join(withdrawal.ids), "how": how, "state": withdrawal.state}))
    if withdrawal.replaced:
        screen.show(make_table("edit", "planned anew as", rows=list(withdrawal.replaced.items())))
    screen.finish(
        {
            "taken_off": withdrawal.ids,
            "exact": withdrawal.is_exact,
            "later": withdrawal.later,
            "replaced": dict(withdrawal.replaced),
            "state": withdrawal.state,
            "warnings": screen.warnings,
        }
    )


def _report(screen: Screen, model: nn.Module, written: Written, **more: Any) -> None:
    """Say what was written, for people and for programs."""
    facts = sum(len(edit["requests"]) for edit in written.edits)
    summary = {
        "checkpoint": str(written.folder),
        "edits": f"{count_noun(len(written.edits), 'edit')} with {count_noun(facts, 'fact')}",
        "changed": ", ".join(written.parameters) or "-",
    }
    screen.show(make_fields(summary))
    spent = measure_cost(screen, next(model.parameters()).device)
    show_cost(screen, spent)
    screen.finish(
        {
            "checkpoint": str(written.folder),
            "model": written.model,
            "edits": [{**edit, "file": edit["source"]} for edit in written.edits],
            "parameters": written.parameters,
            "base": written.base,
            "edited": written.edited,
            **more,
            **spent,
            "warnings": screen.warnings,
        }
    )
