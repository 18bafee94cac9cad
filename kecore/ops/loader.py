"""Chooses which implementation the ops run with: compiled ahead, compiled at first use, or torch.

``KECORE_NATIVE`` chooses:

* ``auto`` (default): the library that came with the package, else one that is compiled now and kept, else torch.
* ``aot``, ``jit``: only that kind; ``require``: either. An error where it cannot be had.
* ``off``: torch.

The choice is made at the first call of an op, never at import, and kept with its reason.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from kecore import _build
from kecore.api.errors import ConfigError, NativeError
from kecore.ops import reference

__all__ = ["MODES", "Backend", "active_backend", "implementation", "native_mode", "why_no_cuda"]

logger = logging.getLogger(__name__)

MODES = {"auto": ("aot", "jit"), "aot": ("aot",), "jit": ("jit",), "require": ("aot", "jit"), "off": ()}
"""Values of ``KECORE_NATIVE``, and the kinds of library that each tries in turn."""

_LIBRARY = "kecore_native"
_FAILED = "failed.txt"
_PATIENCE = 900.0  # seconds that another process may take to compile
_lock = threading.Lock()
_resolved: Backend | None = None


@dataclass(frozen=True, slots=True)
class Backend:
    """The implementation that runs the ops, and why.

    Args:
        kind: ``aot``, ``jit`` or ``torch``.
        reason: why this kind, with what was tried before.
        library: the file that was loaded; None for torch.
        isa: instruction set of the CPU kernels, such as ``avx512-bf16``; empty for torch.
        cuda: why the library has no CUDA kernels; empty where it has.
    """

    kind: str
    reason: str
    library: Path | None = None
    isa: str = ""
    cuda: str = "no native library is loaded"


class _Unavailable(Exception):
    """A kind of library cannot be had here; the message says why."""


def native_mode() -> str:
    """Return the value of ``KECORE_NATIVE``.

    Raises:
        ConfigError: it is none of :data:`MODES`.
    """
    value = os.environ.get("KECORE_NATIVE", "").strip().lower() or "auto"
    if value not in MODES:
        raise ConfigError(f"KECORE_NATIVE is {value!r}; expected one of {', '.join(MODES)}")
    return value


def active_backend() -> Backend:
    """Return what runs the ops in this process; it is chosen, loaded and perhaps compiled at the first call.

    Raises:
        NativeError: ``KECORE_NATIVE`` asks for a native library that cannot be had.
        ConfigError: ``KECORE_NATIVE`` has an unknown value.
    """
    global _resolved
    if _resolved is None:
        with _lock:
            if _resolved is None:
                _resolved = _resolve()
    return _resolved


def implementation(device: torch.device) -> Any:
    """Return the namespace of the ops for tensors on a device: ``torch.ops.kecore``, or :mod:`kecore.ops.reference`."""
    if device.type == "cuda":
        native = not why_no_cuda()
    else:
        native = device.type == "cpu" and active_backend().library is not None
    return torch.ops.kecore if native else reference


def why_no_cuda() -> str:
    """Say why CUDA tensors run in torch; empty where CUDA kernels run them."""
    return active_backend().cuda or _try_cuda()


def _resolve() -> Backend:
    """Load the first library that can be had of the kinds that ``KECORE_NATIVE`` allows; torch where there is none."""
    mode = native_mode()
    if mode == "off":
        return Backend("torch", "KECORE_NATIVE=off")
    forced = mode != "auto"
    if not forced and (reason := _not_worth_it()):
        return Backend("torch", reason)
    load: dict[str, Callable[[bool], tuple[Path, str]]] = {"aot": _load_aot, "jit": _load_jit}
    failures: list[str] = []
    for kind in MODES[mode]:
        try:
            library, cuda = load[kind](forced)
        except _Unavailable as error:
            failures.append(f"{kind}: {error}")
            continue
        isa = _isa(library)
        if torch.cuda.is_available() and cuda:
            logger.warning("kecore runs CUDA tensors in torch: %s", cuda)
        return Backend(kind, "; ".join([*failures, f"CPU kernels use {isa}"]), library, isa, cuda)
    reason = "; ".join(failures)
    if forced:
        raise NativeError(f"KECORE_NATIVE={mode}, but there is no native library: {reason}")
    return Backend("torch", reason)


def _not_worth_it() -> str:
    """Say why torch is as fast on this processor; empty where native kernels are faster."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not torch.cuda.is_available() and not capability.startswith("AVX"):
        return f"torch is faster on this processor ({platform.machine()}, {capability}): no kernels for its vectors"
    return ""


def _load_aot(forced: bool) -> tuple[Path, str]:
    """Load the library that came with the package; return its file and why it has no CUDA kernels, if it has none."""
    package = Path(_build.__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        library = package / f"_C{suffix}"
        if library.is_file():
            try:
                torch.ops.load_library(str(library))
            except OSError as error:
                raise _Unavailable(f"{library} does not load under torch {torch.__version__}: {error}") from error
            return library, "" if _has_cuda(library) else f"{library.name} was built without CUDA"
    raise _Unavailable("this installation has no compiled library")


def _load_jit(forced: bool) -> tuple[Path, str]:
    """Load the library that was compiled here before, or compile it; returns as :func:`_load_aot` does."""
    _check_tools()
    home, no_cuda = _cuda_home()
    folder = _root() / f"kecore_{_fingerprint(home)}"
    library = folder / f"{_LIBRARY}.so"
    failed = folder / _FAILED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "kecore.lock", timeout=_PATIENCE):
            if not forced and failed.is_file():
                raise _Unavailable(
                    f"compiling failed before ({failed}); remove that file or set KECORE_NATIVE=jit to try again"
                )
            if library.is_file():
                torch.ops.load_library(str(library))
            else:
                _compile(folder, home)
                failed.unlink(missing_ok=True)
    except Timeout as error:
        raise _Unavailable(f"another process has been compiling in {folder} for {_PATIENCE:.0f} seconds") from error
    except OSError as error:
        raise _Unavailable(f"{folder} cannot be used: {error}") from error
    return library, no_cuda


def _compile(folder: Path, home: Path | None) -> None:
    """Compile the library in ``folder`` and load it; the caller holds the folder's lock."""
    (folder / "lock").unlink(missing_ok=True)  # torch's own, left by a process that was killed while compiling
    logger.warning("compiling native kernels once, for %s; this takes about half a minute", folder)
    if home is not None:
        os.environ.setdefault("CUDA_HOME", str(home))  # torch reads it when cpp_extension is imported
    from torch.utils import cpp_extension

    kinds = ("cpu", "binding") if home is None else ("cpu", "binding", "cuda")
    flags = [*_build.CXX_FLAGS, *_build.DEFINES, *(() if home is None else _build.CUDA_DEFINES)]
    temporary = f"{_LIBRARY}_{os.getpid()}"
    try:
        if home is not None:
            cpp_extension.CUDA_HOME = str(home)  # it may have been imported before
        cpp_extension.load(
            name=temporary,
            sources=[str(file) for kind in kinds for file in _build.sources(kind)],
            extra_cflags=flags,
            extra_cuda_cflags=[*_build.NVCC_FLAGS, *_build.gencode(_architectures())],
            extra_ldflags=["-pthread", *_cuda_link(folder, home)],
            build_directory=str(folder),
            with_cuda=home is not None,
            is_python_module=False,
        )
    except (RuntimeError, OSError, AssertionError) as error:
        (folder / _FAILED).write_text(str(error), encoding="utf-8")
        raise _Unavailable(
            f"compiling failed: {_last_line(error)}; the whole message is in {folder / _FAILED}"
        ) from error
    # Under its final name only when it is whole and was loaded.
    (folder / f"{temporary}.so").rename(folder / f"{_LIBRARY}.so")


def _last_line(error: BaseException) -> str:
    """Return the last line of a message that speaks of an error, else its last line, else the exception's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    error_lines = [line for line in lines if "error" in line.lower()]
    candidates = error_lines or lines or [type(error).__name__]
    return candidates[-1][:300]


def _check_tools() -> None:
    if sys.platform not in ("linux", "darwin"):
        raise _Unavailable(f"kecore compiles with g++ or clang, on Linux and macOS; this is {sys.platform}")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        raise _Unavailable(f"no C++ compiler ({compiler}); install g++ or clang, or set CXX")
    if shutil.which("ninja") is None and find_spec("ninja") is None:
        raise _Unavailable("ninja is not installed; pip install ninja")
    if not _build.sources("cpu"):
        raise _Unavailable(f"the sources are not in {_build.source_dir()}")


def _root() -> Path:
    """Return the folder of extensions that torch compiled."""
    configured = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(configured) if configured else Path.home() / ".cache" / "torch_extensions"


def _fingerprint(home: Path | None) -> str:
    """Return a digest of everything that the library depends on."""
    settings = [torch.__version__, platform.machine(), os.environ.get("CXX", ""), str(home or "")]
    settings += [*_build.CXX_FLAGS, *_build.DEFINES, *_build.NVCC_FLAGS]
    if home:
        settings += _architectures()
    digest = hashlib.sha256("\0".join(settings).encode())
    files = [*(_build.source_dir() / "kernels").iterdir(), *(_build.source_dir() / "binding").iterdir()]
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _cuda_home() -> tuple[Path | None, str]:
    """Return the toolkit's folder if this torch can use it, else None, and why not."""
    if torch.version.cuda is None:
        return None, "torch is built without CUDA"
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return Path(os.environ[variable]), ""
    wheels = _build.pip_cuda_home()
    if wheels is not None:
        if torch.version.cuda.startswith("13."):
            return wheels, ""
        return None, f"the installed compiler wheels are of CUDA 13, torch is of {torch.version.cuda}; set CUDA_HOME"
    nvcc = shutil.which("nvcc")
    if nvcc:
        return Path(nvcc).resolve().parent.parent, ""
    return None, "no nvcc; pip install 'kecore[cuda]', or set CUDA_HOME to a toolkit"


def _architectures() -> list[str]:
    """Return the architectures of the devices here, or those of every release where there is no device."""
    architectures: set[str] = set()
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        # Kernels for Hopper use instructions of its architecture-specific set.
        suffix = "a" if (major, minor) == (9, 0) else ""
        architectures.add(f"{major}{minor}{suffix}")
    return sorted(architectures) or list(_build.ARCHITECTURES)


def _cuda_link(folder: Path, home: Path | None) -> list[str]:
    """Return linker flags for the compiler wheels: they have ``lib``, not ``lib64``, and only a versioned runtime."""
    if home is None or (home / "lib64" / "libcudart.so").exists():
        return []
    versioned = sorted((home / "lib").glob("libcudart.so.*"))
    if versioned:
        link = folder / "libcudart.so"
        link.unlink(missing_ok=True)
        link.symlink_to(versioned[0])
    return [f"-L{folder}", f"-L{home / 'lib'}"]


def _isa(library: Path) -> str:
    function = ctypes.CDLL(str(library)).ke_cpu_isa
    function.restype = ctypes.c_char_p
    return function().decode()


def _has_cuda(library: Path) -> bool:
    return hasattr(ctypes.CDLL(str(library)), "ke_second_moment_cuda")


@cache
def _try_cuda() -> str:
    """Say why the CUDA kernels do not run on this machine's device; empty where they do."""
    moment = torch.zeros(1, 1, dtype=torch.float64, device="cuda")
    try:
        torch.ops.kecore.second_moment_([moment], [torch.ones(2, 1, device="cuda")])
        return "" if moment.item() == 2 else "a sum came out wrong"
    except RuntimeError as error:
        reason = _last_line(error)
        logger.warning("kecore runs CUDA tensors in torch: %s", reason)
        return reason
