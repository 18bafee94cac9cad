"""Runs the commands of docs/quickstart.md for real and puts what they print below them.

Run ``python docs/_quickstart.py``; it takes a few minutes on a CPU. Lines that begin with ``$`` in ``console`` blocks
are run one after another in a temporary home directory; whatever stands below each is replaced.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

PAGE = Path(__file__).with_name("quickstart.md")
BLOCK = re.compile(r"(?<=^```console\n).*?(?=^```$)", flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Return every command of a page, in order."""
    page_commands: list[str] = []
    for block in BLOCK.findall(text):
        page_commands += _commands_of_block(block)
    return page_commands


def _commands_of_block(block: str) -> list[str]:
    return [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]


def refreshed(text: str, run: Callable[[str], str]) -> str:
    """Return the page with each command's output below it."""

    def refresh(match: re.Match[str]) -> str:
        return "\n".join(f"$ {command}\n{run(command)}" for command in _commands_of_block(match[0]))

    return BLOCK.sub(refresh, text)


def _shell(home: str) -> Callable[[str], str]:
    """Return a function that runs a command as a newcomer would: in a home directory with nothing in it."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {"HOME": home, "PATH": path, "COLUMNS": "100", "PYTHONUNBUFFERED": "1", "KECORE_CACHE": ""}
    environment = {**os.environ, **variables}
    bash = shutil.which("bash") or "bash"

    def run(command: str) -> str:
        done = subprocess.run(
            [bash, "-c", command], cwd=home, env=environment, text=True, stdout=-1, stderr=subprocess.STDOUT
        )
        if done.returncode:
            raise SystemExit(f"$ {command}\n{done.stdout}")
        text = done.stdout.replace(home, "~").replace(sys.prefix, ".venv")
        lines = [line.rstrip() for line in text.splitlines()]
        return "".join(f"{line}\n" for line in lines)

    return run


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        PAGE.write_text(refreshed(PAGE.read_text(encoding="utf-8"), _shell(home)), encoding="utf-8")
