"""The group of all commands: kecore's core ones, and those of plugins.

A plugin's command stands behind the entry-point group ``kecore.commands``, whoever offers it:
``name = "module:object"``, where the object is a function that typer can make a command of, or a :class:`typer.Typer`
with several commands. It is imported when it is called, or when all commands are listed, so a broken one never stands
in the way of another.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any, TypeVar, cast

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from kecore.api.errors import PluginError
from kecore.api.plugins import Plugins, plugin_limits
from kecore.cli.console import Screen
from kecore.cli.errors import report_errors
from kecore.cli.options import spread_files

__all__ = ["GROUP", "CommandGroup", "help_group", "make_command"]

GROUP = "kecore.commands"
"""The entry-point group."""


Function = TypeVar("Function", bound=Callable[..., Any])
_HELP_GROUP = "kecore_help_group"
_OTHERS = "Further commands"


def help_group(title: str) -> Callable[[Function], Function]:
    """Put a command under a title in the list of ``kecore --help``; without it, it stands among the further ones."""

    def mark(function: Function) -> Function:
        setattr(function, _HELP_GROUP, title)
        return function

    return mark


class CommandGroup(TyperGroup):
    """Finds commands, and adds one treatment of output, errors, warnings and interrupts to each."""

    @classmethod
    def of(cls, context: typer.Context) -> CommandGroup:
        """Return the group that the running command belongs to."""
        return cast(CommandGroup, context.find_root().command)

    @cached_property
    def plugins(self) -> Plugins[Any]:
        """The commands of plugins, by the limits of the environment; the names of core commands are taken.

        Raises:
            PluginError: ``KECORE_STRICT_PLUGINS`` is set, and some command cannot be used.
        """
        return Plugins(
            entry_points(group=GROUP),
            noun="command",
            check=make_command,
            missing=PluginError,
            reserved=self.commands,
            **plugin_limits(),
        )

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands that can be used; this imports those of plugins."""
        return [*super().list_commands(ctx), *self.plugins.all()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command; None where nothing is known of the name.

        Raises:
            PluginError: a plugin's command cannot be used, or ``KECORE_PLUGINS`` excludes it.
        """
        command = super().get_command(ctx, cmd_name)
        if command is None and cmd_name in self.plugins:
            return self.plugins.get(cmd_name)
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that the arguments begin with, and suggest near names where there is none."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            near = ", ".join(map(repr, get_close_matches(name, self.list_commands(ctx))))
            ctx.fail(f"No such command '{name}'.{f' Did you mean {near}?' if near else ''}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands into the help, by what they are for; what cannot be used is warned of on stderr."""
        titles: dict[str, list[tuple[str, str]]] = {}
        with report_errors(ctx.obj):
            for name in self.list_commands(ctx):
                command = self.get_command(ctx, name)
                title = getattr(command.callback, _HELP_GROUP, _OTHERS)
                titles.setdefault(title, []).append((name, (command.help or "").strip().partition("\n")[0]))
        width = max(len(name) for rows in titles.values() for name, _ in rows)
        for title in sorted(titles, key=lambda title: title == _OTHERS):
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), line) for name, line in titles[title]])

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Make the screen before anything can fail."""
        ctx.obj = Screen(as_json="--json" in args)
        if args[:1] == ["stats"] and args[1:2] in (["push"], ["pull"]):
            args = args[1:]  # statistics are shared as everything else is; a model of that name is ./push
        return super().parse_args(ctx, spread_files(args))

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        with report_errors(ctx.obj):
            return super().invoke(ctx)


def make_command(target: object, name: str, source: str) -> TyperCommand | TyperGroup:
    """Make a command of what an entry point leads to.

    Args:
        target: a function with typer's annotations, or a ``typer.Typer``.
        name: what users type.
        source: words that name the plugin, for messages.

    Raises:
        PluginError: it is neither, or typer refuses it.
    """
    if isinstance(target, typer.Typer):
        app = target
    elif callable(target) and not isinstance(target, type):
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(name)(cast(Callable[..., Any], target))
    else:
        raise PluginError(f"{source}: the entry point must lead to a function or a typer.Typer, got {target!r}")
    try:
        command = get_command(app)
    except Exception as error:  # typer raises what it likes about a signature
        raise PluginError(f"{source}: typer makes no command of it: {type(error).__name__}: {error}") from error
    command.name = name
    return cast("TyperCommand | TyperGroup", command)
