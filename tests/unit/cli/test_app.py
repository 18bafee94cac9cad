"""What holds for every command: help, exit codes, errors, JSON, interrupts, warnings."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kecore.api import errors
from kecore.cli.commands import info
from kecore.cli.console import Screen
from kecore.cli.errors import CheckFailed, report_errors

COMMANDS = ("demo", "edit", "attach", "revert", "inspect", "chat", "stats", "probe", "methods", "doctor")
Run = Callable[..., Any]


def test_help_names_every_command(kecore: Run) -> None:
    shown = kecore("--help")
    assert shown.exit_code == 0
    assert all(f"\n  {name} " in shown.stdout for name in COMMANDS)
    assert kecore().stdout or kecore().stderr  # without a command the help is shown, too


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_and_help(kecore: Run, name: str) -> None:
    shown = kecore(name, "--help")
    assert shown.exit_code == 0
    assert "--json" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_version(kecore: Run) -> None:
    from kecore import __version__

    assert kecore("--version").stdout == f"kecore {__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from kecore.cli import main\n"
        "try: main()\n"
        "except SystemExit as done: code = done.code\n"
        "assert code == 0, code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'safetensors', 'kecore_methods'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, "--help"], check=True, capture_output=True)


def test_unknown_command_suggests_one(kecore: Run) -> None:
    asked = kecore("edti")
    assert asked.exit_code == 2
    assert "edit" in asked.stderr


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let ``kecore methods`` fail in a given way."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(info, "_show_methods", fail)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.RequestError("bad\nrequest [x]"), 2),
        (errors.MethodNotFoundError("no method"), 2),
        (errors.ArtifactMismatchError("other base"), 2),
        (errors.NonFiniteError("NaN"), 1),
        (errors.StorageError("disk full"), 1),
        (CheckFailed("not so"), 1),
    ],
)
def test_error_is_one_line_and_one_object(
    kecore: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    monkeypatch.delenv("KECORE_DEBUG", raising=False)
    raising(monkeypatch, error)
    plain = kecore("methods")
    assert plain.exit_code == code
    assert plain.stdout == ""
    assert plain.stderr.startswith(f"error: {error!s}")
    name = type(error).__name__
    assert (f"({name}: kecore explain {name})" in plain.stderr) == isinstance(error, errors.KecoreError)
    assert "Traceback" not in plain.stderr
    as_json = kecore("methods", "--json")
    assert as_json.exit_code == code
    assert json.loads(as_json.stdout) == {"error": {"type": name, "message": str(error)}}


def test_debug_brings_the_traceback(kecore: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KECORE_DEBUG", "1")
    raising(monkeypatch, errors.RequestError("bad"))
    assert isinstance(kecore("methods").exception, errors.RequestError)


def test_a_bug_keeps_its_traceback(kecore: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, KeyError("oh"))
    done = kecore("methods", "--json")
    assert isinstance(done.exception, KeyError)
    assert json.loads(done.stdout)["error"]["type"] == "KeyError"


def test_out_of_memory_says_what_to_do(kecore: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    raising(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"))
    done = kecore("methods")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: CUDA out of memory. Tried to allocate 2 GiB. Lower --memory")


def test_interrupt(kecore: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, KeyboardInterrupt())
    done = kecore("methods", "--json")
    assert done.exit_code == 130
    assert json.loads(done.stdout)["error"]["type"] == "KeyboardInterrupt"
    assert done.stderr == "interrupted; nothing was left half-written\n"


def test_usage_errors_are_objects_too(kecore: Run) -> None:
    done = kecore("edit", "demo", "--prompt", "Ada is", "--subject", "Ada", "--target", "here", "--json")
    assert done.exit_code == 2
    assert "--out" in json.loads(done.stdout)["error"]["message"]


def test_warnings_are_lines_and_are_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    with report_errors(screen):
        for _ in range(2):
            warnings.warn("mind [this]", errors.KecoreWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: mind [this]\n"
    assert screen.warnings == ["mind [this]"]


def test_notices_of_kecore_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("kecore.models")
    with report_errors(Screen()):
        logger.info("unpacking %s", "[x]")
    logger.info("not shown")
    assert capsys.readouterr().err == "unpacking [x]\n"


def test_methods(kecore: Run) -> None:
    listed = json.loads(kecore("methods", "--json").stdout)["methods"]
    rows = {row["name"]: row for row in listed}
    assert {"memit", "rome", "alphaedit", "emmet", "ft-l", "ft-m"} <= set(rows)
    memit = rows["memit"]
    assert memit["kind"] == "weights"
    assert memit["capabilities"]["needs_statistics"] is True
    assert "arXiv" in memit["reference"]
    assert Path(memit["origin"].rpartition(":")[0]).name == "memit.py"
    shown = kecore("methods").stdout
    assert "memit" in shown
    assert "43 editing methods" in shown
    assert len(shown.splitlines()) < 50
    assert "needs key statistics" in " ".join(kecore("methods", "memit").stdout.split())


def test_a_broken_plugin_is_listed_with_its_reason(kecore: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from kecore.api import registry

    broken = registry.MethodInfo("bad", "somebody", "1.0", "x:Y", error="no module named [x]")
    monkeypatch.setattr(registry.Registry, "describe", lambda _self: [broken])
    assert "cannot be used: bad: no module named [x]" in kecore("methods").stdout


def test_doctor(kecore: Run) -> None:
    found = json.loads(kecore("doctor", "--json").stdout)
    assert {"kecore", "packages", "methods", "cache", "problems"} <= set(found)
    shown = kecore("doctor").stdout
    assert "torch" in shown
