"""Reports what this installation can do, as data: versions, devices, methods, cache, demo model, native ops.

Nothing here raises for a broken part: finding those is what the report is for.
"""

from __future__ import annotations

import platform
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch

from kecore import models
from kecore._version import __version__
from kecore.api import registry
from kecore.api.errors import ConfigError, KecoreWarning, NativeError
from kecore.api.plugins import PluginInfo
from kecore.environment import package_versions

__all__ = ["Backend", "Cache", "Device", "Report", "make_report"]


@dataclass(frozen=True, slots=True)
class Device:
    """An accelerator that torch sees.

    Args:
        name: as the driver calls it.
        memory: bytes in all.
        capability: compute capability, such as ``"9.0"``.
    """

    name: str
    memory: int
    capability: str


@dataclass(frozen=True, slots=True)
class Cache:
    """The cache directory.

    Args:
        path: where it is, or will be.
        writable: files can be made there.
        free: bytes free on its disk.
    """

    path: str
    writable: bool
    free: int


@dataclass(frozen=True, slots=True)
class Backend:
    """What runs one native operation, and why.

    Args:
        op: the operation.
        backend: ``aot``, ``jit``, ``torch`` and so on, in the words of :mod:`kecore.ops`.
        reason: why this one.
        relative_error: relative error of its result on a small problem, against float64.
    """

    op: str
    backend: str
    reason: str
    relative_error: float


@dataclass(frozen=True, slots=True)
class Report:
    """The state of an installation.

    Args:
        kecore: version of kecore.
        python: version of Python.
        platform: operating system and processor.
        packages: version of each dependency by name; None where it is not installed.
        cuda_build: CUDA version that torch was built for; None for a build without CUDA.
        devices: accelerators that torch can use.
        threads: threads that torch computes with on the CPU.
        instructions: the widest vectors that torch uses on the CPU, such as ``"AVX2"``.
        bfloat16_speed: how many times as fast as float32's its bfloat16 products are; below 1, ``precision=bfloat16``
            only costs time.
        methods: every offered method, usable or not.
        commands: every command of a plugin, usable or not.
        cache: the cache directory.
        demo: path of the demo model's file; None where its wheel is not installed.
        backends: what runs each native operation; empty where what was asked for cannot be had.
        refused: ``KECORE_NATIVE`` asks for native code that is not what runs.
        problems: what is wrong, and what to do about it; empty where all is well.
    """

    kecore: str
    python: str
    platform: str
    packages: dict[str, str | None]
    cuda_build: str | None
    devices: tuple[Device, ...]
    threads: int
    instructions: str
    bfloat16_speed: float
    methods: tuple[registry.MethodInfo, ...]
    commands: tuple[PluginInfo, ...]
    cache: Cache
    demo: str | None
    backends: tuple[Backend, ...]
    refused: bool
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {**asdict(self), "methods": [method.to_json() for method in self.methods]}


PACKAGES = ("torch", "transformers", "numpy", "safetensors", "pydantic", "gguf", "accelerate", "ninja")
"""Dependencies whose version matters when something goes wrong, optional ones included."""


def make_report(commands: Sequence[PluginInfo] = ()) -> Report:
    """Look at this installation; imports every method, and builds native code where that is due.

    Args:
        commands: the commands of plugins, which only the command line knows.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)  # what they say stands in the report
        methods = tuple(registry.default_registry().describe())
    cache = _cache()
    demo = models.demo_file()
    backends, refused, backend_problems = _backends()
    problems = [plugin.error for plugin in (*methods, *commands) if plugin.error]
    if not methods:
        problems.append("no editing methods are installed; install kecore with pip, so that they register")
    if not cache.writable:
        problems.append(f"the cache {cache.path} cannot be written; set KECORE_CACHE to a directory that can")
    if demo is None:
        problems.append(models.DEMO_MISSING)
    problems += backend_problems
    return Report(
        kecore=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages=package_versions(PACKAGES),
        cuda_build=torch.version.cuda,
        devices=_devices(),
        threads=torch.get_num_threads(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        bfloat16_speed=_bfloat16_speed(),
        methods=methods,
        commands=tuple(commands),
        cache=cache,
        demo=str(demo) if demo else None,
        backends=backends,
        refused=refused,
        problems=tuple(problems),
    )


def _bfloat16_speed() -> float:
    """Measure how many times as fast as float32's the CPU's bfloat16 products are, by one of a few milliseconds."""
    seconds: list[float] = []
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        times: list[float] = []
        for _ in range(5):
            begin = perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(perf_counter() - begin)
        seconds.append(min(times))
    return seconds[0] / seconds[1]


def _devices() -> tuple[Device, ...]:
    if not torch.cuda.is_available():
        return ()
    devices: list[Device] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        devices.append(Device(properties.name, properties.total_memory, capability))
    return tuple(devices)


def _cache() -> Cache:
    path = models.cache_dir()
    # The cache is made at first use; until then its nearest existing parent decides.
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            writable = True
    except OSError:
        writable = False
    return Cache(str(path), writable, shutil.disk_usage(parent).free)


def _backends() -> tuple[tuple[Backend, ...], bool, list[str]]:
    """Check the native operations: what runs them, whether what was asked for is refused, and what is wrong."""
    from kecore.ops import measure

    try:
        backends = tuple(Backend(*row) for row in measure.self_test())
    except (NativeError, ConfigError) as error:
        return (), True, [str(error)]
    except Exception as error:  # noqa: BLE001 - a report on broken compilers must survive them
        return (), True, [f"the native operations cannot be inspected: {type(error).__name__}: {error}"]
    problems: list[str] = []
    for backend in backends:
        if measure.is_wrong(backend.op, backend.relative_error):
            problems.append(
                f"{backend.op} of {backend.backend} is off by {backend.relative_error:.1e}: set KECORE_NATIVE=off, and "
                "report it with this text"
            )
    return backends, False, problems
