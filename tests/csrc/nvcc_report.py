"""Runs nvcc and keeps what ptxas says of each kernel; checks it against the budget.

nvcc_report.py --report FILE nvcc ...       compile, write ptxas's lines to FILE
nvcc_report.py --check FILE FLAGS...        every kernel on every architecture of FLAGS, within the budget
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

# Kernels, how many instances each has, and registers a thread may take: there are 255 at most, and 128 let two blocks
# of 256 threads share a multiprocessor.
KERNELS = {"second_moment_aligned": (2, 250), "second_moment_any": (3, 250), "gram_solve": (1, 128)}

_KERNEL = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


def compile_with_report(report: Path, command: list[str]) -> int:
    """Run nvcc; on success write its report."""
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if run.returncode != 0 or "warning" in run.stdout.lower():
        sys.stdout.write(run.stdout)
        return run.returncode or 1
    report.write_text(run.stdout)
    return 0


def parse(report: str) -> dict[tuple[str, str], dict[str, int]]:
    """``(mangled name, architecture)`` to registers, stack and spilled bytes."""
    kernels: dict[tuple[str, str], dict[str, int]] = {}
    current: dict[str, int] = {}
    for line in report.splitlines():
        if found := _KERNEL.search(line):
            current = kernels.setdefault((found[1], found[2]), {})
        elif found := _SPILLS.search(line):
            current.update(stack=int(found[1]), spilled=int(found[2]) + int(found[3]))
        elif found := _REGISTERS.search(line):
            current["registers"] = int(found[1])
    return kernels


def problems(report: str, flags: list[str]) -> list[str]:
    """What is missing from the report or above the budget."""
    kernels = parse(report)
    wrong = []
    architectures = [found[1] for flag in flags if (found := re.search(r"code=(sm_\w+)", flag))]
    if not architectures:
        wrong.append("the flags name no architecture")
    for architecture in architectures:
        for name, (instances, registers) in KERNELS.items():
            found = [used for k, used in kernels.items() if name in k[0] and k[1] == architecture]
            if len(found) != instances:
                wrong.append(f"{architecture}: {len(found)} kernels {name}, not {instances}")
            for used in found:
                if used["registers"] > registers or used["stack"] > 0 or used["spilled"] > 0:
                    wrong.append(f"{architecture}: {name}: {used}, of {registers} registers")
    return wrong


def main(arguments: list[str]) -> int:
    """The command line."""
    mode, report, rest = arguments[0], Path(arguments[1]), arguments[2:]
    if mode == "--report":
        return compile_with_report(report, rest)
    wrong = problems(report.read_text(), rest)
    for (name, architecture), used in sorted(parse(report.read_text()).items()):
        sys.stdout.write(f"{architecture:8} {used['registers']:4} registers  {name}\n")
    sys.stdout.writelines(f"over budget: {line}\n" for line in wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
