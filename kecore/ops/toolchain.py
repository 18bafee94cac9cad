"""What the native library is compiled with: C++ compiler, CUDA toolkit, and the architectures to compile for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from kecore import _build

__all__ = ["choose_architectures", "cuda_link_flags", "find_cuda", "missing_tool", "print_version"]

_LEAST_CAPABILITY = (8, 0)
"""Compute capability below which a device lacks instructions that the CUDA kernels use."""


def missing_tool() -> str:
    """Say what is missing to compile the CPU kernels; empty where nothing is."""
    if sys.platform not in ("linux", "darwin"):
        return f"kecore compiles with g++ or clang, on Linux and macOS; this is {sys.platform}"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler ({compiler}); install g++ or clang, or set CXX"
    if shutil.which("ninja") is None and find_spec("ninja") is None:
        return "ninja is not installed; pip install ninja"
    if not _build.sources("cpu"):
        return f"the sources are not in {_build.source_dir()}"
    return ""


@cache
def print_version(*command: str) -> str:
    """Return what a compiler prints about itself; why it does not where it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout


def find_cuda() -> tuple[Path | None, str]:
    """Return the toolkit's folder if this torch and the devices here can use it, else None, and why not."""
    if torch.version.cuda is None:
        return None, "torch is built without CUDA"
    home, reason = _find_toolkit()
    if home is not None and not choose_architectures(home):
        least = ".".join(str(part) for part in _LEAST_CAPABILITY)
        return None, (
            f"the CUDA kernels need a device of compute capability {least} or newer that {home} has code for; "
            f"here is {_describe_devices()}"
        )
    return home, reason


def _find_toolkit() -> tuple[Path | None, str]:
    """Return the folder of the CUDA toolkit, else None, and why."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return Path(os.environ[variable]), ""
    wheels = _build.pip_cuda_home()
    if wheels is not None:
        if torch.version.cuda and torch.version.cuda.startswith("13."):
            return wheels, ""
        return None, f"the installed compiler wheels are of CUDA 13, torch is of {torch.version.cuda}; set CUDA_HOME"
    nvcc = shutil.which("nvcc")
    if nvcc:
        return Path(nvcc).resolve().parent.parent, ""
    return None, "no nvcc; pip install 'kecore[cuda]', or set CUDA_HOME to a toolkit"


def _describe_devices() -> str:
    names: list[str] = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} ({major}.{minor})")
    return ", ".join(names) or "no device"


def choose_architectures(home: Path) -> list[str]:
    """Return what to compile for: the devices here, or those of every release where there is no device.

    Args:
        home: the toolkit; what it has no code for is left out.
    """
    wanted: set[str] = set()
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if (major, minor) >= _LEAST_CAPABILITY:
            # Kernels for Hopper use instructions of its architecture-specific set.
            suffix = "a" if (major, minor) == (9, 0) else ""
            wanted.add(f"{major}{minor}{suffix}")
    if torch.cuda.device_count() == 0:
        wanted.update(_build.ARCHITECTURES)
    # One line each, such as compute_90; nothing where the toolkit's compiler does not run, which compiling will say.
    known = print_version(str(home / "bin" / "nvcc"), "--list-gpu-arch").split()
    if any(line.startswith("compute_") for line in known):
        wanted = {name for name in wanted if f"compute_{name.removesuffix('a')}" in known}
    return sorted(wanted)


def cuda_link_flags(folder: Path, home: Path | None) -> list[str]:
    """Return linker flags for the compiler wheels: they have ``lib``, not ``lib64``, and only a versioned runtime."""
    if home is None or (home / "lib64" / "libcudart.so").exists():
        return []
    versioned = sorted((home / "lib").glob("libcudart.so.*"))
    if versioned:
        link = folder / "libcudart.so"
        link.unlink(missing_ok=True)
        link.symlink_to(versioned[0])
    return [f"-L{folder}", f"-L{home / 'lib'}"]
