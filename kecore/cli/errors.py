"""Turns an exception into one line on stderr, an object on stdout where JSON was asked for, and an exit code."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import typer
from rich.markup import escape

from kecore.api import errors
from kecore.api.errors import KecoreError, KecoreWarning, NumericalError, StorageError, WorkerError
from kecore.api.pages import web_address
from kecore.api.progress import STAGES
from kecore.cli.console import Screen

__all__ = ["BAD_INPUT", "FAILED", "INTERRUPTED", "CheckFailed", "report_errors"]

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
"""Exit codes: the input is at fault; the work failed or a check did; Ctrl-C. 0 is success."""


class CheckFailed(Exception):
    """Something that the command set out to prove does not hold."""


@contextmanager
def report_errors(screen: Screen) -> Iterator[None]:
    """Report whatever ends a command early, and every warning and notice of kecore's."""
    with _warnings_on(screen), _notices_on(screen):
        try:
            yield
        except (typer.Exit, BrokenPipeError):
            raise  # a broken pipe means that the reader of our output is gone: typer knows what to do
        except KeyboardInterrupt:
            screen.err.print("interrupted; nothing was left half-written")
            _emit(screen, "KeyboardInterrupt", "interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            message, code = _explain(error)
            _emit(screen, type(error).__name__, message or _message(error))
            if message is None or os.environ.get("KECORE_DEBUG", "0") not in ("", "0"):
                raise
            _say(screen, error, message)
            raise typer.Exit(code) from None


def _explain(error: Exception) -> tuple[str | None, int]:
    """Return what to say about an error, None where only a traceback helps, and the exit code."""
    if isinstance(error, KecoreError):
        return str(error), FAILED if isinstance(error, NumericalError | StorageError | WorkerError) else BAD_INPUT
    if isinstance(error, CheckFailed):
        return str(error), FAILED
    if hasattr(error, "format_message"):  # typer's, about options and arguments
        path = getattr(getattr(error, "ctx", None), "command_path", "kecore")
        return f"{_message(error).rstrip('.')} (see `{path} --help`)", BAD_INPUT
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
        first = str(error).partition("\n")[0]
        return f"{first} Lower --memory, choose --dtype bfloat16, or use --device cpu", FAILED
    return None, FAILED


def _say(screen: Screen, error: Exception, message: str) -> None:
    name = type(error).__name__
    screen.err.quiet = False  # a process that shares the work with others is silent, but not about its end
    page = ""
    if isinstance(error, KecoreError) and name in errors.__all__:
        address = web_address(name)
        page = f" [dim]({name}: kecore explain {name}{f', {address}' if address else ''})[/]"
    screen.err.print(f"[bold red]error:[/] {escape(message)}{page}", soft_wrap=True)


def _emit(screen: Screen, kind: str, message: str) -> None:
    screen.finish({"error": {"type": kind, "message": message}})


def _message(error: Exception) -> str:
    """Return the message of any exception, typer's own included."""
    formatted: Any = getattr(error, "format_message", None)
    return str(error) if formatted is None else str(formatted()).removeprefix("Invalid value: ")


@contextmanager
def _notices_on(screen: Screen) -> Iterator[None]:
    """Show what kecore's modules log."""
    logger, handler = logging.getLogger("kecore"), _Notices(screen)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Notices(logging.Handler):
    def __init__(self, screen: Screen) -> None:
        super().__init__()
        self.screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == STAGES:
            return  # a command shows its stages by itself
        self.screen.log(record.getMessage())


@contextmanager
def _warnings_on(screen: Screen) -> Iterator[None]:
    """Show kecore's warnings as lines of the screen, each text once; others as Python does."""
    usual = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, KecoreWarning):
            usual(message, category, filename, lineno, file, line)
        elif str(message) not in screen.warnings:
            screen.warn(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", KecoreWarning)
        warnings.showwarning = show
        yield
