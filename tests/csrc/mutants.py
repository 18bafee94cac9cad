"""Planted mistakes in copies of the CUDA sources, each of which the tests must catch.

    mutants.py --list
    mutants.py --name NAME --folder F --library libemulated.a --objects *.o -- g++ FLAGS

A mistake that no test catches is a hole in the tests (or no mistake): then this fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Mutant:
    """A mistake.

    Args:
        program: which kernel's tests must catch it.
        test: which of them.
        file: under ``csrc/kernels``.
        edits: texts that stand there once each, and what replaces them.
    """

    program: str
    test: str
    file: str
    edits: list[tuple[str, str]] = field(default_factory=list)


def read(path: Path) -> dict[str, Mutant]:
    """The mistakes of a file, by name."""
    mutants: dict[str, Mutant] = {}
    for line, before in pairwise_lines(path):
        if line.startswith("-"):
            edits = next(reversed(mutants.values())).edits
            if not before.startswith("-"):
                edits.append((line[1:], ""))
            else:
                edits[-1] = (edits[-1][0] + "\n" + line[1:], "")
        elif line.startswith("+"):
            edits = next(reversed(mutants.values())).edits
            old, new = edits[-1]
            edits[-1] = (old, new + "\n" + line[1:] if before.startswith("+") else line[1:])
        elif line and not line.startswith("#"):
            name, rest = line.split(":")
            mutants[name] = Mutant(*rest.split())
    return mutants


def pairwise_lines(path: Path) -> list[tuple[str, str]]:
    """Each line with the one before it."""
    lines = path.read_text().splitlines()
    return list(zip(lines, ["", *lines], strict=False))


MUTANTS = read(Path(__file__).with_suffix(".txt"))


def mutate(mutant: Mutant, folder: Path) -> Path:
    """Copy the sources into ``folder`` with the mistake in them; the kernels' folder."""
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("kernels", "emulator"):
        shutil.copytree(ROOT / "csrc" / part, folder / "csrc" / part)
    shutil.copytree(ROOT / "tests" / "csrc", folder / "tests" / "csrc")
    path = folder / "csrc" / "kernels" / mutant.file
    text = path.read_text()
    for old, new in mutant.edits:
        if text.count(old) != 1:
            raise SystemExit(f"{mutant.file} holds {text.count(old)} times, not once: {old!r}")
        text = text.replace(old, new)
    path.write_text(text)
    return folder / "csrc" / "kernels"


def build(mutant: Mutant, folder: Path, options: argparse.Namespace) -> Path:
    """The test's program with the mistake."""
    kernels = mutate(mutant, folder)
    program = folder / "test"
    command = [part for part in options.compiler if part != f"-I{ROOT / 'csrc' / 'kernels'}"] + [f"-I{kernels}"]
    if mutant.program == "tile_order":  # it includes the headers itself
        parts = [str(folder / "tests" / "csrc" / "tile_order_test.cpp")]
    else:
        parts = [o for o in options.objects if Path(o).name.startswith(mutant.program)]
        parts += ["-xc++", str(kernels / f"{mutant.program}.cu"), "-xnone"]
    # What a mistake leaves unused is not what is looked for here, hence no warnings.
    subprocess.run([*command, "-w", *parts, options.library, "-o", str(program)], check=True)
    return program


def main() -> int:
    """The command line; 0 if the mistake was caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--name", choices=MUTANTS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--library")
    parser.add_argument("--objects", nargs="+")
    parser.add_argument("compiler", nargs="*")
    options = parser.parse_args()
    if options.list:
        sys.stdout.writelines(f"{name}\n" for name in MUTANTS)
        return 0
    mutant = MUTANTS[options.name]
    folder = options.folder / options.name
    program = build(mutant, folder, options)
    # The first wrong number is enough; a hang (a thread that waits for ever) is one, too.
    environment = {**os.environ, "KECORE_TEST_STOP": "1", "ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run([str(program), mutant.test], env=environment, capture_output=True, text=True, timeout=60)
    shutil.rmtree(folder)
    sys.stdout.write(run.stderr[-600:])
    if run.returncode == 0:
        sys.stdout.write(f"{mutant.program} {mutant.test} passes with the mistake {options.name}\n")
    return 0 if run.returncode != 0 else 1


if __name__ == "__main__":
    sys.exit(main())
