"""The one description of the native build: sources, flags, architectures.

``setup.py`` (ahead of time), :mod:`kecore.ops.loader` (at first use) and CMake (through ``python kecore/_build.py
KEY``) all read it, so this file imports nothing but the standard library.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = [
    "ARCHITECTURES",
    "CUDA_DEFINES",
    "CXX_FLAGS",
    "DEFINES",
    "NVCC_FLAGS",
    "PTX",
    "cxx_flags",
    "gencode",
    "pip_cuda_home",
    "source_dir",
    "sources",
]

CXX_FLAGS = ("-O3", "-g0", "-std=c++17", "-fPIC", "-pthread", "-Wall", "-Wextra")
"""Of the kernels, and of the binding under the oldest torch; :func:`cxx_flags` has those of a given one."""

NVCC_FLAGS = ("-O3", "-std=c++17", "-Xcompiler", "-fPIC")
DEFINES = ("-DTORCH_TARGET_VERSION=0x020a000000000000",)
"""The binding uses no more than torch 2.10 has, so it runs on that and every later one."""

CUDA_DEFINES = ("-DKECORE_CUDA", "-DUSE_CUDA")
"""What the binding needs beside them to reach the CUDA kernels."""

ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
"""What a build for other machines covers."""

PTX = f"-gencode=arch=compute_{ARCHITECTURES[0]},code=compute_{ARCHITECTURES[0]}"
"""What devices run that are newer than all of them."""


def cxx_flags(torch_version: str) -> tuple[str, ...]:
    """Flags of the C++ compiler under a version of torch, whose headers are written for C++20 from 2.13 on."""
    major, minor = (int(part) for part in torch_version.split(".")[:2])
    if (major, minor) < (2, 13):
        return CXX_FLAGS
    return tuple("-std=c++20" if flag == "-std=c++17" else flag for flag in CXX_FLAGS)


def source_dir() -> Path:
    """Where the sources stand: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "_csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def sources(kind: str) -> list[Path]:
    """Source files, in a fixed order.

    Args:
        kind: ``cpu`` for the torch-free CPU kernels, ``cuda`` for the CUDA ones, ``binding`` for the glue to torch.
    """
    folder, suffix = {"cpu": ("kernels", "cpp"), "cuda": ("kernels", "cu"), "binding": ("binding", "cpp")}[kind]
    return sorted((source_dir() / folder).glob(f"*.{suffix}"))


def gencode(architectures: Iterable[str]) -> list[str]:
    """Flags by which nvcc makes code for each architecture (``"90a"``)."""
    return [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]


def pip_cuda_home() -> Path | None:
    """The CUDA home that the wheels of ``kecore[cuda]`` make, None where they are not installed."""
    for entry in sys.path:
        home = Path(entry) / "nvidia" / "cu13"
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file():
            return home
    return None


def main(key: str) -> None:
    """Write one entry, items separated by semicolons as CMake's lists are."""
    values: dict[str, Iterable[object]] = {
        "architectures": ARCHITECTURES,
        "cxx-flags": CXX_FLAGS,
        "nvcc-flags": NVCC_FLAGS,
        **{f"{kind}-sources": sources(kind) for kind in ("cpu", "cuda", "binding")},
    }
    sys.stdout.write(";".join(map(str, values[key])))


if __name__ == "__main__":
    main(sys.argv[1])
