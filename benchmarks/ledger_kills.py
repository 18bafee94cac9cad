"""Kills processes that edit, save and append to a ledger at random moments, and checks what is left each time.

    python benchmarks/ledger_kills.py --kills 200

One process imports torch and forks a worker for each kill; the worker edits a tiny model, saves edits and appends to
the ledger until SIGKILL ends it. What the worker was told is accepted goes through a pipe, so that after the kill the
ledger can be held against it: all of it is there, no half of an edit is, every file is as written, and no lock is
left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import torch

from kecore import Editor, EditRequest
from kecore.api.errors import ArtifactError
from kecore.edit import load_edit
from kecore.testing import tiny_model, tiny_tokenizer
from kecore_serve.check import check_files
from kecore_serve.ledger import Ledger


@dataclass
class Count:
    """What was seen over all kills."""

    kills: int = 0
    accepted: int = 0
    taken_back: int = 0
    leftovers: int = 0
    seconds: float = 0.0


def work(editor: Editor, folder: Path, report: int, seed: int) -> NoReturn:
    """Edit and append until killed; each line of the report is written once the ledger has accepted what it names."""
    try:
        with Ledger.open(folder) as ledger:
            editor.follow(ledger)
            number = 0
            while True:
                number += 1
                request = EditRequest("{} is in", f"Place {seed}-{number}", f"Town {number}", id=f"{seed}-{number}")
                edit = editor.edit(request, "ft-m", steps=1)
                os.write(report, f"+{edit.id}\n".encode())
                edit.save(folder.parent / "saved" / f"{number % 3}.safetensors")
                if number % 3 == 0:
                    gone = random.choice(ledger.active_ids())
                    editor.withdraw(gone)
                    os.write(report, f"-{gone}\n".encode())
    except BaseException as error:  # the parent has to know; a worker ends by a kill alone
        os.write(report, f"!{error!r}\n".encode())
        raise
    finally:
        os._exit(1)


def kill_one(editor: Editor, folder: Path, seed: int) -> list[str]:
    """Fork a worker, kill it at a random moment, and return the lines of its report."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        random.seed(seed)
        work(editor, folder, write_end, seed)
    os.close(write_end)
    time.sleep(random.uniform(0.0, 1.2))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(read_end, encoding="utf-8") as stream:
        return stream.read().splitlines()


def check(folder: Path, expected: list[str], lines: list[str]) -> list[str]:
    """Hold the ledger against what was accepted, and return the ids in effect.

    Raises:
        AssertionError: says what was lost or half-written.
    """
    for line in lines:
        assert line[0] in "+-", f"the worker failed by itself: {line}"
        if line[0] == "+":
            expected.append(line[1:])
        else:
            expected.remove(line[1:])
    with Ledger.open(folder, wait=0.0) as ledger:
        problems = check_files(ledger)
        assert not problems, problems
        active = list(ledger.active_ids())
        # The last thing that was done may have been accepted without the worker's having said so.
        last = ledger.events()[-1].body if ledger.events() else {}
        beyond = expected + [id_ for id_ in last.get("added", []) if id_ not in expected]
        fewer = [id_ for id_ in expected if id_ not in last.get("removed", [])]
        assert active in (expected, beyond, fewer), (active, expected)
        with ledger.writing():
            pass  # no lock is left behind
    for path in (folder.parent / "saved").glob("*.safetensors"):
        try:
            load_edit(path)
        except ArtifactError as error:
            raise AssertionError(f"half an edit under its final name: {error}") from error
    return active


def main(arguments: list[str] | None = None) -> int:
    """Kill, check, and print the count as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a forked process has one thread
    random.seed(options.seed)
    count, begin = Count(), time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "ledger"
        (Path(place) / "saved").mkdir()
        editor = Editor(tiny_model("llama", layers=2), tiny_tokenizer(), statistics=None, progress=None)
        Ledger.create(folder, "tiny", editor.base).close()
        active: list[str] = []
        for number in range(options.kills):
            lines = kill_one(editor, folder, options.seed * 1_000_000 + number)
            active = check(folder, active, lines)
            count.kills += 1
            count.accepted += sum(line[0] == "+" for line in lines)
            count.taken_back += sum(line[0] == "-" for line in lines)
            with Ledger.open(folder) as ledger:
                count.leftovers = max(count.leftovers, len(ledger.leftovers()))
    count.seconds = round(time.perf_counter() - begin, 1)
    sys.stdout.write(json.dumps(asdict(count)) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
