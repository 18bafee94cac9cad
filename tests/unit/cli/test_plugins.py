"""Commands of plugins: found like methods, imported when they are called, and never in the way of others."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
Install = Callable[..., None]

BUILT_IN = (
    *("cache", "check", "trace", "checkup", "eval", "compare", "bench", "report", "import-triples", "metrics"),
    *("ledger", "log", "tag", "diff", "checkout", "verify", "replay", "serve", "sign", "studio"),
)
GREET = '''
import typer

def greet(name: str, loudly: bool = False) -> None:
    """Greet somebody."""
    typer.echo(name.upper() if loudly else name)
'''


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install pretended distributions, each with one command."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("KECORE_PLUGINS", raising=False)
    monkeypatch.delenv("KECORE_STRICT_PLUGINS", raising=False)

    def add(distribution: str, command: str, source: str = GREET, target: str = "greet") -> None:
        module = f"fake_{distribution}_{command}".replace("-", "_")
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{distribution}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[kecore.commands]\n{command} = {module}:{target}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)

    return add


def test_core_names_no_command_of_a_plugin(root: Path) -> None:
    from kecore.cli import app

    core = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    assert not core & {*BUILT_IN, "import_triples"}
    code = "import sys, kecore.cli; print([name for name in sys.modules if name.startswith('kecore_')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_core_command_imports_no_plugin() -> None:
    code = (
        "import sys; from kecore.cli import main\n"
        "try: main()\n"
        "except SystemExit as done: assert done.code == 0\n"
        "print([name for name in sys.modules if name.startswith('kecore_')])"
    )
    done = subprocess.run([sys.executable, "-c", code, "edit", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_help_lists_all_commands_of_plugins(kecore: Run) -> None:
    shown = kecore("--help")
    assert all(f"\n  {name} " in shown.stdout for name in BUILT_IN)
    assert shown.stderr == ""


def test_a_strangers_command_is_listed_and_runs(kecore: Run, install: Install) -> None:
    install("other", "greet")
    assert "greet           Greet somebody." in kecore("--help").stdout
    assert kecore("greet", "Ada", "--loudly").stdout == "ADA\n"
    assert "--loudly" in kecore("greet", "--help").stdout
    wrong = kecore("greet", "Ada", "--wrongly")
    assert wrong.exit_code == 2
    assert wrong.stderr.startswith("error: No such option")


def test_a_stranger_may_bring_several_commands_under_one_name(kecore: Run, install: Install) -> None:
    several = f"{GREET}\napp = typer.Typer()\napp.command()(greet)\n\n@app.command()\ndef part(): typer.echo('bye')\n"
    install("other", "say", several, "app")
    assert kecore("say", "part").stdout == "bye\n"
    assert kecore("say", "greet", "Ada").stdout == "Ada\n"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import nothing_of_this_name", "cannot be imported from fake_other_greet:greet: ModuleNotFoundError"),
        ("greet = 3", "the entry point must lead to a function or a typer.Typer, got 3"),
        ("class greet: pass", "must lead to a function or a typer.Typer, got <class"),
        ("def greet(x: list[list[int]]): pass", "typer makes no command of it"),
        ("import typer\ngreet = typer.Typer()", "typer makes no command of it"),
    ],
    ids=["import", "number", "class", "signature", "empty"],
)
def test_a_broken_command_is_named_and_blocks_nobody(kecore: Run, install: Install, source: str, reason: str) -> None:
    install("other", "greet", source)
    shown = kecore("--help")
    assert shown.exit_code == 0
    assert "\n  bench " in shown.stdout
    assert "\n  greet " not in shown.stdout
    assert shown.stderr.count(reason) == 1
    assert shown.stderr.startswith("warning: command 'greet' of other")
    called = kecore("greet", "--json")
    assert called.exit_code == 2
    assert json.loads(called.stdout)["error"]["type"] == "PluginError"
    assert reason in called.stderr
    for unharmed in (kecore("methods"), kecore("edit", "--help"), kecore("bench", "--help")):
        assert unharmed.exit_code == 0
        assert "greet" not in unharmed.stderr


@pytest.mark.parametrize("name", ["edit", "bench"])
def test_a_command_of_kecore_cannot_be_replaced(kecore: Run, install: Install, name: str) -> None:
    install("other", name)
    assert "Greet somebody" not in kecore(name, "--help").stdout
    shown = kecore("--help")
    assert "Greet somebody" not in shown.stdout
    assert f"other offers a command '{name}', but that name belongs to kecore" in shown.stderr


def test_doctor_names_every_command_that_cannot_be_used(
    kecore: Run, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kecore import doctor

    monkeypatch.setattr(doctor, "_backends", lambda: ((), False, []))  # the native operations take seconds
    install("other", "greet", "1 / 0")
    install("third", "edit")
    report = json.loads(kecore("doctor", "--json").stdout)
    assert {row["name"]: bool(row["error"]) for row in report["commands"]} == {
        **dict.fromkeys(BUILT_IN, False),
        "greet": True,
        "edit": True,
    }
    problems = "\n".join(report["problems"])
    assert "command 'greet' of other cannot be imported from fake_other_greet:greet: ZeroDivisionError" in problems
    assert "third offers a command 'edit', but that name belongs to kecore" in problems
    shown = " ".join(kecore("doctor").stdout.split())
    assert "greet (cannot be used), import-triples, ledger, log, metrics" in shown


def test_two_strangers_with_one_command_are_both_named(kecore: Run, install: Install) -> None:
    install("one", "greet")
    install("two", "greet")
    called = kecore("greet", "Ada")
    assert called.exit_code == 2
    assert "is offered by both" in called.stderr


def test_the_environment_limits_commands_as_it_does_methods(
    kecore: Run, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("other", "greet")
    monkeypatch.setenv("KECORE_PLUGINS", "")
    called = kecore("greet", "Ada")
    assert called.exit_code == 2
    assert "command 'greet' is installed by other, which KECORE_PLUGINS excludes" in called.stderr
    shown = kecore("--help")
    assert "Greet somebody" not in shown.stdout
    assert "\n  bench " in shown.stdout
    monkeypatch.setenv("KECORE_PLUGINS", "other")
    assert kecore("greet", "Ada").stdout == "Ada\n"


def test_strict_raises_the_first_failure(kecore: Run, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("other", "greet", "1 / 0")
    monkeypatch.setenv("KECORE_STRICT_PLUGINS", "1")
    for words in (["--help"], ["bench", "--help"], ["doctor"]):
        done = kecore(*words)
        assert done.exit_code == 2
        assert "ZeroDivisionError" in done.stderr
    assert kecore("edit", "--help").exit_code == 0


def test_an_unknown_command_suggests_one_of_a_plugin(kecore: Run) -> None:
    asked = kecore("bnch")
    assert asked.exit_code == 2
    assert "No such command 'bnch'. Did you mean 'bench'" in asked.stderr


def test_commands_stand_in_groups_and_no_line_is_cut(kecore: Run) -> None:
    shown = kecore("--help", env={"COLUMNS": "80"}).stdout
    groups = re.findall(r"^(\w[\w ]*):$", shown, re.MULTILINE)
    titles = ["Edit facts", "Use edits elsewhere", "Prepare", "Write a method", "Find your way", "Measure"]
    assert groups == ["Options", *titles, "Keep a model current"]
    assert "..." not in shown.partition("Edit facts")[2]
    assert max(map(len, shown.splitlines())) <= 80
