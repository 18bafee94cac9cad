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
import mmap
import os
import platform
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from kecore import _build
from kecore.api.errors import ConfigError, NativeError
from kecore.ops import reference
from kecore.ops.toolchain import choose_architectures, cuda_link_flags, find_cuda, missing_tool, print_version

__all__ = ["MODES", "Backend", "active_backend", "implementation", "native_mode", "why_no_cuda"]

logger = logging.getLogger(__name__)

MODES = {"auto": ("aot", "jit"), "aot": ("aot",), "jit": ("jit",), "require": ("aot", "jit"), "off": ()}
"""Values of ``KECORE_NATIVE``, and the kinds of library that each tries in turn."""

_LIBRARY = "kecore_native"
_FAILED = "failed.txt"
_ISAS = ("amx-bf16", "avx512-bf16", "avx512", "avx2", "generic")
"""Instruction sets that ``KECORE_CPU_ISA`` may name as the widest to use; ``csrc/kernels/cpu_isa.cpp`` has them."""

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
    _check_isa()
    if mode == "off":
        return Backend("torch", "KECORE_NATIVE=off")
    forced = mode != "auto"
    if not forced and (reason := _not_worth_it()):
        return Backend("torch", reason)
    load: dict[str, Callable[[bool], tuple[Path, str]]] = {"aot": _load_aot, "jit": _load_jit}
    failures: list[str] = []
    for kind in _preferred(MODES[mode]):
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


def _check_isa() -> None:
    """Refuse an unknown ``KECORE_CPU_ISA``, which would silently choose the slowest kernels.

    Raises:
        ConfigError: it names no instruction set; lists them.
    """
    value = os.environ.get("KECORE_CPU_ISA", "")
    if value and value not in _ISAS:
        raise ConfigError(f"KECORE_CPU_ISA is {value!r}; expected one of {', '.join(_ISAS)}")


def _preferred(kinds: Sequence[str]) -> Sequence[str]:
    """Return kinds of library in the order to try them.

    A library that came without CUDA kernels would keep them from being compiled, so where there is a device and a
    compiler for it, compiling comes first.
    """
    library = _aot_library()
    lacks_cuda = library is not None and not _has_cuda(library)
    if lacks_cuda and torch.cuda.is_available() and find_cuda()[0] is not None:
        return sorted(kinds, key=lambda kind: kind != "jit")
    return kinds


def _not_worth_it() -> str:
    """Say why torch is as fast on this processor; empty where native kernels are faster."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not torch.cuda.is_available() and not capability.startswith("AVX"):
        return f"torch is faster on this processor ({platform.machine()}, {capability}): no kernels for its vectors"
    return ""


def _load_aot(forced: bool) -> tuple[Path, str]:
    """Load the library that came with the package; return its file and why it has no CUDA kernels, if it has none."""
    library = _aot_library()
    if library is None:
        raise _Unavailable("this installation has no compiled library")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise _Unavailable(f"{library} does not load under torch {torch.__version__}: {error}") from error
    return library, "" if _has_cuda(library) else f"{library.name} was built without CUDA"


def _aot_library() -> Path | None:
    """Return the library that came with the package; None where none did."""
    package = Path(_build.__file__).parent
    libraries = [package / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES]
    return next((library for library in libraries if library.is_file()), None)


def _load_jit(forced: bool) -> tuple[Path, str]:
    """Load the library that was compiled here before, or compile it; returns as :func:`_load_aot` does.

    Where the CUDA kernels cannot be compiled, the CPU kernels are still.
    """
    if missing := missing_tool():
        raise _Unavailable(missing)
    home, no_cuda = find_cuda()
    if home is not None:
        try:
            return _load_or_compile(home, forced), ""
        except _Unavailable as error:
            no_cuda = f"with CUDA kernels, {error}"
    return _load_or_compile(None, forced), no_cuda


def _load_or_compile(home: Path | None, forced: bool) -> Path:
    """Return the library, loaded: as it was compiled here before, or compiled now.

    Args:
        home: the CUDA toolkit; None leaves the CUDA kernels out.
        forced: try again where compiling failed before.

    Raises:
        _Unavailable: it cannot be compiled.
    """
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
    return library


def _compile(folder: Path, home: Path | None) -> None:
    """Compile the library in ``folder`` and load it; the caller holds the folder's lock."""
    (folder / "lock").unlink(missing_ok=True)  # torch's own, left by a process that was killed while compiling
    logger.warning("compiling native kernels once, for %s; this takes about half a minute", folder)
    from torch.utils import cpp_extension

    kinds = ("cpu", "binding") if home is None else ("cpu", "binding", "cuda")
    flags = [*_build.cxx_flags(torch.__version__), *_build.DEFINES, *(() if home is None else _build.CUDA_DEFINES)]
    temporary = f"{_LIBRARY}_{os.getpid()}"
    cuda_home = cpp_extension.CUDA_HOME
    try:
        if home is not None:
            cpp_extension.CUDA_HOME = str(home)  # that of the whole process, so it is put back
        cpp_extension.load(
            name=temporary,
            sources=[str(file) for kind in kinds for file in _build.sources(kind)],
            extra_cflags=flags,
            extra_cuda_cflags=[] if home is None else [*_build.NVCC_FLAGS, *_build.gencode(choose_architectures(home))],
            extra_ldflags=["-pthread", *cuda_link_flags(folder, home)],
            build_directory=str(folder),
            with_cuda=home is not None,
            is_python_module=False,
        )
    except (RuntimeError, OSError, AssertionError) as error:
        (folder / _FAILED).write_text(str(error), encoding="utf-8")
        raise _Unavailable(
            f"compiling failed: {_last_line(error)}; the whole message is in {folder / _FAILED}"
        ) from error
    finally:
        cpp_extension.CUDA_HOME = cuda_home
    # Under its final name only when it is whole and was loaded.
    (folder / f"{temporary}.so").rename(folder / f"{_LIBRARY}.so")


def _last_line(error: BaseException) -> str:
    """Return the last line of a message that speaks of an error, else its last line, else the exception's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    error_lines = [line for line in lines if "error" in line.lower()]
    candidates = error_lines or lines or [type(error).__name__]
    return candidates[-1][:300]


def _root() -> Path:
    """Return the folder of extensions that torch compiled."""
    configured = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(configured) if configured else Path.home() / ".cache" / "torch_extensions"


def _fingerprint(home: Path | None) -> str:
    """Return a digest of everything that the library depends on, the compilers' versions among it.

    A library that could not be compiled is tried again once any of these changes.
    """
    settings = [torch.__version__, platform.machine(), os.environ.get("CXX", "")]
    settings.append(print_version(*os.environ.get("CXX", "c++").split(), "--version"))
    settings += [*_build.cxx_flags(torch.__version__), *_build.DEFINES]
    if home is not None:
        settings += [str(home), print_version(str(home / "bin" / "nvcc"), "--version")]
        settings += [*_build.NVCC_FLAGS, *choose_architectures(home)]
    digest = hashlib.sha256("\0".join(settings).encode())
    files = [*(_build.source_dir() / "kernels").iterdir(), *(_build.source_dir() / "binding").iterdir()]
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _isa(library: Path) -> str:
    function = ctypes.CDLL(str(library)).ke_cpu_isa
    function.restype = ctypes.c_char_p
    return function().decode()


def _has_cuda(library: Path) -> bool:
    """Return whether a library has CUDA kernels, without loading it, which would register its ops."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"ke_second_moment_cuda") >= 0


_cuda_verdicts: dict[int, str] = {}
"""Why the CUDA kernels do not run on a device, by its index; empty where they do."""


def _try_cuda() -> str:
    """Say why the CUDA kernels do not run on the current device; empty where they do.

    Tried once a device. What may be otherwise at the next call is not held against it: memory that is full now, and
    the capture of a graph, in which nothing can be tried.
    """
    device = torch.cuda.current_device()
    if device not in _cuda_verdicts:
        if torch.cuda.is_current_stream_capturing():
            return "a graph is being captured; call an op once before"
        try:
            _cuda_verdicts[device] = _sum_on_cuda()
        except torch.OutOfMemoryError as error:
            return _last_line(error)
        except RuntimeError as error:
            _cuda_verdicts[device] = _last_line(error)
        if _cuda_verdicts[device]:
            logger.warning("kecore runs CUDA tensors in torch: %s", _cuda_verdicts[device])
    return _cuda_verdicts[device]


def _sum_on_cuda() -> str:
    """Run the smallest sum on the current CUDA device; say what is wrong with it, if anything is."""
    moment = torch.zeros(1, 1, dtype=torch.float64, device="cuda")
    torch.ops.kecore.second_moment_([moment], [torch.ones(2, 1, device="cuda")])
    return "" if moment.item() == 2 else "a sum came out wrong"
