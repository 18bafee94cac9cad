"""The phases of benchmarks/gpu_check.sh: is the native code right on this GPU, and how fast is it?

    python benchmarks/gpu_check.py PHASE --out FILE [--device cuda] [--small]

Each phase adds its rows to FILE (JSON), so that what was measured survives a phase that fails; `table` prints them.
Every timed computation is compared with float64 first. With `--small --device cpu` all but the sanitizer's phase runs
anywhere, which is how the tests see to it that no slip of the pen is found on a GPU's time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_correct import Row, check, sanitize
from gpu_editing import editing
from gpu_timing import batched_solve, ceilings, many_layers, moment, solve, truncation

from kecore.ops import loader

ROOT = Path(__file__).resolve().parent.parent


def environment(device: torch.device, small: bool) -> list[Row]:
    backend = loader.active_backend()
    row: Row = {
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": backend.kind,
        "reason": backend.reason,
        "cuda_refused": backend.cuda,
        "ok": device.type != "cuda" or not backend.cuda,
        "device": "cpu",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        row |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": driver(),
        }
    return [row]


def commit() -> str:
    return os.environ.get("KECORE_COMMIT") or output("git", "-C", str(ROOT), "describe", "--always", "--dirty")


def driver() -> str:
    return output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]


def output(*command: str) -> str:
    """What a program prints; "unknown" where it fails or is not there."""
    if shutil.which(command[0]) is None:
        return "unknown"
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


PHASES: dict[str, Callable[[torch.device, bool], list[Row]]] = {
    phase.__name__: phase
    for phase in (
        environment,
        check,
        sanitize,
        ceilings,
        moment,
        many_layers,
        solve,
        batched_solve,
        truncation,
        editing,
    )
}


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(results: dict[str, list[Row]]) -> str:
    """All rows of all phases, aligned for people."""
    lines = []
    for phase, rows in results.items():
        lines.append(f"\n== {phase}")
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(tuple(row), []).append(row)
        for columns, members in groups.items():
            cells = [list(columns), *([shown(row[c]) for c in columns] for row in members)]
            widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
            lines += ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run one phase; 1 if something came out wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=[*PHASES, "table"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script itself")
    options = parser.parse_args(arguments)
    results: dict[str, list[Row]] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    if options.phase == "table":
        sys.stdout.write(table(results) + "\n")
        return 0
    torch.manual_seed(0)
    rows = PHASES[options.phase](torch.device(options.device), options.small)
    results[options.phase] = rows
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    sys.stdout.write(table({options.phase: rows}) + "\n")
    return 0 if all(row.get("ok", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
