"""``kecore ledger init`` begins a ledger; ``log``, ``tag``, ``diff`` and ``checkout`` read it and move in it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kecore.cli import options
from kecore.cli.console import Screen, count_noun, make_fields, make_table
from kecore.cli.loading import Loading
from kecore.cli.plugins import help_group

if TYPE_CHECKING:
    from kecore_serve.ledger import Ledger
    from kecore_serve.records import Entry, Event

__all__ = ["app", "checkout", "diff", "log", "tag"]

TITLE = "Keep a model current"
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The ledger.", show_default=False)]
Note = Annotated[str, typer.Option(metavar="TEXT", help="Words for the history.", show_default=False)]
_MOMENT = "A tag, the beginning of a state or of an edit's id, base or head."

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)


@app.callback()
@help_group(TITLE)
def root() -> None:
    """Begin a history of a model's edits that outlives a crash."""


@app.command()
def init(
    context: typer.Context,
    model: options.Model,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.", show_default=False)],
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Begin the history of MODEL's edits in a new folder DIR; MODEL itself stays as it is."""
    screen = Screen.of(context)
    from kecore.files import check_new_folder
    from kecore_serve.ledger import Ledger

    check_new_folder(folder)
    reference = str(Path(model).resolve()) if Path(model).exists() else model
    editor = Loading(model, device, dtype, trust_remote_code).edit(screen, statistics=None)
    with Ledger.create(folder, reference, editor.base) as ledger:
        fields = {"ledger": str(folder), "model": reference, "state": ledger.state}
        screen.show(make_fields({**fields, "base": f"{_base(ledger)[:12]}, {ledger.base.dtype}"}))
        name = quote(str(folder))
        screen.commands("Next", f"kecore edit --ledger {name} --facts FILE", f"kecore log {name}")
        screen.finish({**fields, "base": dict(ledger.base.digests), "dtype": ledger.base.dtype})


@help_group(TITLE)
def log(context: typer.Context, folder: Folder, as_json: options.AsJson = False) -> None:
    """Show what happened to a model: its edits, who made them, and which are in effect."""
    screen = Screen.of(context)
    from kecore_serve.ledger import Ledger

    with Ledger.open(folder) as ledger:
        active = ledger.active_ids()
        tags: dict[str, list[str]] = {}
        for name, state in ledger.tags.items():
            tags.setdefault(state, []).append(name)
        screen.show(make_fields({"model": ledger.model, "base": f"{_base(ledger)[:12]}, {ledger.base.dtype}",
                                 "state": " ".join([ledger.state, *tags.get(ledger.state, ())]),
                                 "in effect": count_noun(len(active), "edit")}))  # fmt: skip
        entries = {entry.id: entry for entry in ledger.entries()}
        rows = [_event_row(event, entries, active) for event in ledger.events()]
        screen.show(make_table("time", "by", "what happened", "facts", "state", rows=rows))
        values = {
            "model": ledger.model,
            "base": dict(ledger.base.digests),
            "state": ledger.state,
            "tags": ledger.tags,
            "entries": [{**_entry_values(entry), "active": entry.id in active} for entry in ledger.entries()],
            "events": [_event_values(event) for event in ledger.events()],
        }
        screen.finish(values)


@help_group(TITLE)
def tag(
    context: typer.Context,
    folder: Folder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name, which does not move later.")],
    at: Annotated[str, typer.Option(metavar="MOMENT", help=_MOMENT)] = "head",
    note: Note = "",
    as_json: options.AsJson = False,
) -> None:
    """Give a moment of a ledger a name."""
    screen = Screen.of(context)
    from kecore_serve.ledger import Ledger

    with Ledger.open(folder) as ledger:
        state = ledger.tag(name, at, note=note)
    screen.show(f"'{name}' is state {state}")
    screen.finish({"tag": name, "state": state})


@help_group(TITLE)
def diff(
    context: typer.Context,
    folder: Folder,
    first: Annotated[str, typer.Argument(metavar="A", help=_MOMENT, show_default=False)],
    second: Annotated[str, typer.Argument(metavar="B", help=_MOMENT)] = "head",
    as_json: options.AsJson = False,
) -> None:
    """Show which edits are in effect at one moment of a ledger and not at another."""
    screen = Screen.of(context)
    from kecore_serve.ledger import Ledger

    with Ledger.open(folder) as ledger:
        difference = ledger.diff(first, second)
    rows = [("-", *_entry_row(entry)) for entry in difference.only_first]
    rows += [("+", *_entry_row(entry)) for entry in difference.only_second]
    title = f"From {difference.first} to {difference.second}"
    if rows:
        screen.show(make_table("", "edit", "method", "facts", rows=rows, title=title))
    screen.show(f"{count_noun(difference.both, 'edit')} in effect at both")
    screen.finish(
        {
            "first": difference.first,
            "second": difference.second,
            "only_first": [_entry_values(entry) for entry in difference.only_first],
            "only_second": [_entry_values(entry) for entry in difference.only_second],
            "both": difference.both,
        }
    )


@help_group(TITLE)
def checkout(
    context: typer.Context,
    folder: Folder,
    moment: Annotated[str, typer.Argument(metavar="MOMENT", help=_MOMENT, show_default=False)],
    note: Note = "",
    as_json: options.AsJson = False,
) -> None:
    """Let the edits be in effect that were at an earlier moment; what came since stays in the history."""
    screen = Screen.of(context)
    from kecore_serve.ledger import Ledger

    with Ledger.open(folder) as ledger:
        before = ledger.state
        state = ledger.checkout(moment, note=note)
        active = ledger.active_ids()
    screen.show(make_fields({"state": f"{before} -> {state}", "in effect": count_noun(len(active), "edit")}))
    screen.finish({"before": before, "state": state, "active": active})


def _base(ledger: Ledger) -> str:
    return ledger.base.digests[ledger.base.dtype]


def _facts(entry: Entry) -> str:
    """Say what an edit is of: its first fact, and how many more there are."""
    if not entry.facts:
        return ""
    first = f"{entry.facts[0]['prompt']} -> {entry.facts[0]['target']}"
    return first if len(entry.facts) == 1 else f"{first}, and {len(entry.facts) - 1} more"


def _entry_row(entry: Entry) -> tuple[str, str, str]:
    return entry.id, entry.method, _facts(entry)


def _event_row(event: Event, entries: dict[str, Entry], active: Sequence[str]) -> tuple[str, str, str, str, str]:
    """Return the cells of one event."""
    moment = time.strftime("%m-%d %H:%M", time.localtime(event.time))
    body = event.body
    facts = ""
    if event.kind in ("append", "replay"):
        added: list[str] = list(body.get("added", ()))
        marks = [id_ if id_ in active else f"{id_} (not in effect)" for id_ in added]
        methods = ", ".join(dict.fromkeys(entries[id_].method for id_ in added))
        what = f"edit {', '.join(marks)} by {methods}" if added else "planned anew"
        if body.get("removed"):
            what += f", instead of {', '.join(body['removed'])}"
        facts = "; ".join(_facts(entries[id_]) for id_ in added)
    elif event.kind == "revert":
        what = f"took back {', '.join(body['removed'])}"
        facts = "; ".join(_facts(entries[id_]) for id_ in body["removed"])
    elif event.kind == "tag":
        what = f"tag {body['tag']}"
    elif event.kind == "checkout":
        what = f"checked out {body['to']}"
    else:
        what = f"scores of {', '.join(body.get('scores', {}))}"
    if event.note:
        what += f" ({event.note})"
    return moment, event.author, what, facts, event.state[:8]


def _entry_values(entry: Entry) -> dict[str, Any]:
    """Return an entry as JSON values."""
    who = {"event": entry.event, "time": entry.time, "author": entry.author, "note": entry.note}
    return {**entry.to_json(), **who, "scores": dict(entry.scores)}


def _event_values(event: Event) -> dict[str, Any]:
    """Return an event as JSON values, without what the entries say."""
    body = {name: value for name, value in event.body.items() if name != "edits"}
    who = {"number": event.number, "kind": event.kind, "time": event.time, "author": event.author, "note": event.note}
    return {**who, **body, "state": event.state}
