"""The screen of a command: results on stdout, all else on stderr, stages timed, long ones with a bar."""

from __future__ import annotations

import math
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

__all__ = [
    "Screen",
    "count_noun",
    "format_bytes",
    "format_estimate",
    "format_score",
    "format_seconds",
    "make_fields",
    "make_table",
    "replace_controls",
]


class Screen:
    """Both output streams of one command.

    Args:
        as_json: stdout carries one JSON object and nothing else.
    """

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.out = Console(highlight=False, quiet=as_json, emoji=False)
        self.err = Console(highlight=False, stderr=True, emoji=False)
        self.stages: dict[str, float] = {}
        self.warnings: list[str] = []
        self.started = time.perf_counter()
        self.finished = False
        self._bar: Progress | None = None
        self._doing = self._part = ""

    @classmethod
    def of(cls, context: typer.Context) -> Screen:
        """Return the screen of the command that is running."""
        screen = context.find_root().obj
        return screen if isinstance(screen, cls) else cls()

    def show(self, *parts: RenderableType) -> None:
        """Print a part of the result for people; nothing where JSON was asked for."""
        self.out.print(*parts)

    def commands(self, title: str, *lines: str) -> None:
        """Print commands to copy, each on one line however long it is."""
        self.out.print(f"\n[bold]{title}[/]")
        for line in lines:
            self.out.print(f"  {escape(line)}", soft_wrap=True)

    def finish(self, values: Mapping[str, Any]) -> None:
        """Print the result for programs, where JSON was asked for; only the first one counts."""
        if self.as_json and not self.finished:
            import json

            self.finished = True
            typer.echo(json.dumps(to_plain_json(values), ensure_ascii=False, allow_nan=False))

    def log(self, text: str) -> None:
        """Say on stderr what goes on."""
        self.err.print(f"[dim]{escape(text)}[/]", soft_wrap=True)

    def warn(self, text: str) -> None:
        """Say on stderr what the user should know."""
        self.warnings.append(text)
        self.err.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)

    @contextmanager
    def stage(self, name: str, doing: str, *, bar: bool = True) -> Iterator[None]:
        """Time a stage, and show that it runs.

        Args:
            name: its key in the results.
            doing: what is done, in the present participle: ``"loading the model"``.
            bar: show a bar; not where something else may draw one.
        """
        if not bar and self.err.is_terminal:
            self.log(doing)
        begin = time.perf_counter()
        with self._running(doing) if bar else nullcontext():
            try:
                yield
            finally:
                spent = time.perf_counter() - begin
                self.stages[name] = self.stages.get(name, 0.0) + spent
        self.err.print(f"[green]done[/] {escape(doing)} [dim]{format_seconds(spent)}[/]", soft_wrap=True)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Move the bar; what kecore's functions take as ``progress``."""
        bar = self._bar
        if bar is None:
            return
        if stage != self._part:  # a new clock for the time that remains
            self._part = stage
            bar.reset(bar.task_ids[0], total=total or None, description=f"{self._doing} [dim]{escape(stage)}[/]")
        bar.update(bar.task_ids[0], completed=done, total=total or None)

    @property
    def elapsed(self) -> float:
        """Seconds since the command began."""
        return time.perf_counter() - self.started

    @contextmanager
    def _running(self, doing: str) -> Iterator[None]:
        """Show a bar on a terminal while a block runs."""
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), _Count(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self.err, transient=True, disable=not self.err.is_terminal)
        self._doing, self._part = escape(doing), ""
        with self._bar as bar:
            bar.add_task(self._doing, total=None)
            try:
                yield
            finally:
                self._bar = None


class _Count(MofNCompleteColumn):
    """``12/40``, or nothing where there is nothing to count."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


def to_plain_json(value: Any) -> Any:
    """Turn a value into what JSON can hold: paths as text, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): to_plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def replace_controls(text: str) -> str:
    """Replace control characters other than line breaks, which a model may write and a terminal would obey."""

    def is_control(character: str) -> bool:
        return unicodedata.category(character) == "Cc" and character != "\n"

    return "".join("\N{REPLACEMENT CHARACTER}" if is_control(character) else character for character in text)


def count_noun(number: int, noun: str) -> str:
    """Write a number of things: ``1 fact``, ``2 facts``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_seconds(value: float) -> str:
    """Write a duration for people."""
    if value < 0.1:
        return f"{1000 * value:.0f} ms"
    if value < 100:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s"


def format_estimate(value: float) -> str:
    """Write a duration that is not known exactly."""
    if value < 1:
        return "1 s"
    return f"{value:.0f} s" if value < 100 else format_seconds(value)


def format_bytes(count: int | None) -> str:
    """Write a number of bytes for people."""
    if count is None:
        return "unknown"
    if count < 1024:
        return f"{count} bytes"
    value = float(count)
    for unit in ("KiB", "MiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.2f} GiB"


def format_score(value: float | None) -> str:
    """Write a score for people; a dash where it could not be taken."""
    return "-" if value is None else f"{value:.3f}"


def make_table(
    *headers: str, rows: Sequence[Sequence[str]], title: str = "", right: Sequence[int] = (), lines: bool = False
) -> Table:
    """Make a table of plain text.

    Args:
        headers: one for each column.
        rows: their cells, which may hold any characters.
        title: stands above it.
        right: indices of columns that are set flush right.
        lines: lines between the rows, for cells of many words.
    """
    table = Table(
        title=title or None, title_justify="left", title_style="bold", header_style="dim", box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0), show_lines=lines,
    )  # fmt: skip
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(replace_controls(cell)) for cell in row))
    return table


def make_fields(values: Mapping[str, str]) -> Table:
    """Make a table of names and values in two columns without lines."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(escape(name), escape(replace_controls(value)))
    return table
