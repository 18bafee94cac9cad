"""Says what a number was measured with: versions and hardware, as results record them."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kecore._version import __version__

__all__ = ["environment", "hardware", "package_versions"]


def package_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the version of each package by name; None where it is not installed."""
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def hardware(device: Any) -> dict[str, Any]:
    """Return the machine, as results record it."""
    import torch  # seconds, which commands that only ask for help should not wait

    values = {
        "device": str(device),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        values["accelerator"] = torch.cuda.get_device_name(device)
    return values


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def environment(device: Any) -> dict[str, Any]:
    """Return versions and hardware: what a number needs beside its protocol."""
    versions: dict[str, str | None] = {"kecore": __version__, "python": platform.python_version()}
    versions |= package_versions(("torch", "transformers"))
    return {"versions": versions, "hardware": hardware(device)}
