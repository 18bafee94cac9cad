"""``kecore verify`` and ``kecore replay``: is a ledger whole, and what does it give?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kecore.cli import options
from kecore.cli.console import Screen, count_noun, make_fields, make_table
from kecore.cli.errors import CheckFailed
from kecore.cli.loading import Loading
from kecore.cli.plugins import help_group
from kecore_serve.commands.ledger import TITLE, Folder

if TYPE_CHECKING:
    from kecore.editor import Editor
    from kecore_serve.ledger import Ledger

__all__ = ["replay", "verify"]


@help_group(TITLE)
def verify(
    context: typer.Context,
    folder: Folder,
    files_only: Annotated[
        bool, typer.Option("--files", help="Check the files alone; no model is loaded, and no fact is asked.")
    ] = False,
    chat: options.Chat = False,
    device: options.Device = "auto",
    memory: options.Memory = "auto",
    trust_remote_code: options.RemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Check a ledger: its files, the model's fingerprint, and whether every fact in effect still holds.

    Exits with 1 where something is wrong.
    """
    screen = Screen.of(context)
    from kecore_serve.check import check_facts, check_files
    from kecore_serve.ledger import Ledger

    with Ledger.open(folder) as ledger:
        with screen.stage("files", f"checking the files of {count_noun(len(ledger.entries()), 'edit')}"):
            problems = check_files(ledger)
            leftovers = ledger.leftovers()
        values = {
            "state": ledger.state,
            "edits": len(ledger.entries()),
            "active": len(ledger.active_ids()),
            "problems": [{"what": problem.what, "message": problem.message} for problem in problems],
            "leftovers": [str(path) for path in leftovers],
        }
        wrong = [f"{problem.what}: {problem.message}" for problem in problems]
        screen.show(make_fields({"state": ledger.state, "files": f"{len(wrong)} damaged" if wrong else "as written"}))
        if leftovers:
            screen.log(
                f"{count_noun(len(leftovers), 'file')} of a writer that died; the next edit removes what is left"
            )
        if not files_only and not wrong:
            editor = _follow(screen, ledger, chat, Loading(ledger.model, device, "auto", trust_remote_code), memory)
            with screen.stage("facts", "asking the model"):
                holding = check_facts(ledger, editor)
            failed = [(id_, r.id, r.text, r.target) for id_, r in holding.failed]
            values |= {"facts": holding.checked, "failed": [{"edit": row[0], "id": row[1]} for row in failed]}
            holds = f"{holding.checked - len(failed)} of {holding.checked} facts hold"
            screen.show("The fact holds" if holding.checked == 1 and not failed else holds)
            if failed:
                screen.show(make_table("edit", "id", "prompt", "target", rows=failed, title="Facts that do not hold"))
                wrong.append(f"{len(failed)} of {holding.checked} facts do not hold")
    screen.finish(values)
    if wrong:
        raise CheckFailed("; ".join(wrong))


@help_group(TITLE)
def replay(
    context: typer.Context,
    folder: Folder,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the model as a checkpoint.", show_default=False)
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    memory: options.Memory = "auto",
    trust_remote_code: options.RemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Put a ledger's edits on its base again, bit for bit, and write the model with --out."""
    screen = Screen.of(context)
    from kecore.api.identity import Identity
    from kecore.files import check_new_folder
    from kecore_serve.ledger import Ledger

    if out is not None:
        check_new_folder(out)
    with Ledger.open(folder) as ledger:
        editor = _follow(screen, ledger, False, Loading(ledger.model, device, dtype, trust_remote_code), memory)
        digest = Identity(editor.model).of()
        active = ledger.active_ids()
        if out is not None:
            with screen.stage("save", f"writing {out}"):
                editor.save_checkpoint(out, ref=ledger.model)
        fields = {"state": ledger.state, "in effect": count_noun(len(active), "edit"), "weights": digest}
        if out is not None:
            fields["checkpoint"] = str(out)
        screen.show(make_fields(fields))
        screen.finish({"state": ledger.state, "active": active, "weights": digest, "checkpoint": out})


def _follow(screen: Screen, ledger: Ledger, chat: bool, loading: Loading, memory: str) -> Editor:
    """Open a session on a ledger's model with its edits on it."""
    editor = loading.edit(screen, statistics=None, chat=chat, memory=options.byte_count(memory))
    with screen.stage("attach", f"putting {count_noun(len(ledger.active_ids()), 'edit')} on it"):
        editor.follow(ledger)
    return editor
