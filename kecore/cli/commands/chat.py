"""``kecore chat`` shows what the model writes after typed prompts, with and without the edits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kecore.api.errors import RequestError
from kecore.cli import options
from kecore.cli.console import Screen, make_table, replace_controls
from kecore.cli.loading import Loading
from kecore.cli.machine import measure_cost

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kecore.edit import Edit

__all__ = ["chat"]

_QUIT = ("/quit", "/exit", "/q")
_BEFORE = "/before"
_HELP = ("/help", "/h", "/?")
_HELP_TEXT = """\
Type the beginning of a sentence (or a question, with --chat); the model goes on.
/before  ask the model before the edits too, or no longer
/help    show this
/quit    leave"""


def chat(
    context: typer.Context,
    model: options.Model,
    edits: options.Edits = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Longest answer, in tokens.", min=1)] = 40,
    chat_template: options.Chat = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Type prompts, see the model before and after.

    MODEL may be a checkpoint of `kecore attach`; then 'before' is its base. Prompts can also come through a pipe,
    one a line. /help lists what else can be typed. Edits that were made in the chat template are asked in it.
    """
    screen = Screen.of(context)
    from kecore.edit import load_edit, suspended

    loaded_edits = [load_edit(path) for path in edits or []]
    if not chat_template and any(edit.notes.get("form") == "chat" for edit in loaded_edits):
        screen.log("the edit was made in the chat template, so prompts are put into it")
        chat_template = True
    loaded = Loading(model, device, dtype, trust_remote_code, seed).load(screen)
    with screen.stage("read", "reading the model's structure"):
        from kecore.inference import generate
        from kecore.model import ModelView
        from kecore.text import Encoder

        view = ModelView.of(loaded.model, whole=True)
        encoder = Encoder(loaded.tokenizer, chat=chat_template, max_length=view.max_length, handover=view.handover_ids)
        base = _attach_all(loaded.model, model, loaded_edits)
        edited = bool(base or loaded_edits)
    turns: list[dict[str, str | None]] = []
    shows_before = True
    for prompt in _prompts(screen):
        if prompt == _BEFORE:
            shows_before = not shows_before
            screen.log(f"the model before the edits is {'asked too' if shows_before else 'not asked'}")
            continue
        if prompt.startswith("/") and prompt.split()[0] in _HELP:
            screen.log(_HELP_TEXT)
            continue
        turn: dict[str, str | None] = {"prompt": prompt, "before": None}
        turns.append(turn)
        try:
            turn["after"] = generate(view, encoder, [prompt], max_new_tokens=max_new_tokens)[0].text
            if edited and shows_before:
                with view.overlay(base), suspended(loaded.model):
                    turn["before"] = generate(view, encoder, [prompt], max_new_tokens=max_new_tokens)[0].text
        except RequestError as error:  # too long, for instance: the next prompt may be better
            turn["after"], turn["error"] = None, str(error)
            screen.warn(str(error))
        else:
            _show(screen, prompt, turn["before"], turn["after"])
    values = {"model": model, "edits": [str(path) for path in edits or []], "turns": turns}
    screen.finish({**values, **measure_cost(screen, view.device), "warnings": screen.warnings})


def _attach_all(model: Any, ref: str, edits: list[Edit]) -> dict[nn.Parameter, Tensor]:
    """Attach edits, and return the data of the unedited parameters; empty where no weight is edited."""
    from kecore.checkpoint import read_record
    from kecore.edit import WeightEdit

    parameters = dict(model.named_parameters())
    record = read_record(ref)
    stored = {} if record is None else record.base_data(model)
    base = {parameters[name]: data.to(parameters[name].dtype) for name, data in stored.items()}
    for edit in edits:
        changed = edit.parameters if isinstance(edit, WeightEdit) else ()
        before = {name: parameters[name].data for name in changed if name in parameters}
        edit.attach(model)
        for name, data in before.items():
            base.setdefault(parameters[name], data)
    return base


def _prompts(screen: Screen) -> Iterator[str]:
    """Yield the lines of a person or a pipe, up to the end or a command to quit."""
    is_person = sys.stdin.isatty()
    prompt = "" if screen.as_json else "> "
    if is_person:
        with suppress(ImportError):
            import_module("readline")  # gives input() its line editing
        screen.err.print("[dim]Type the beginning of a sentence; /help says more, /quit leaves.[/]")
    while True:
        try:
            line = input(prompt) if is_person else _read_line()
        except EOFError:
            return
        line = line.strip()
        if line in _QUIT:
            return
        if line:
            yield line


def _read_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _show(screen: Screen, prompt: str, before: str | None, after: str | None) -> None:
    echo = "" if sys.stdin.isatty() else f"[bold]{escape(replace_controls(prompt))}[/]"  # a person has just typed it
    if before is None:
        screen.show(f"{echo} {escape(replace_controls(after or ''))}\n")
        return
    screen.show(echo)
    changed = after if after and after != before else "(the same)"
    table = make_table("before", "after", rows=[(before, changed)])
    table.expand = True
    for column in table.columns:
        column.ratio = 1
    screen.show(table)
