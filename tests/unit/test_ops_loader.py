"""How the native library is found, compiled, kept, refused and done without."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kecore import _build
from kecore.api.errors import ConfigError, NativeError
from kecore.ops import OPS, loader, reference, toolchain

SOLVE = """
import json, torch
from kecore.ops import kv_solve, loader
k = torch.eye(3)
error = None
try:
    kv_solve(k, k, 1.0)
except Exception as e:
    error = f"{type(e).__name__}: {e}"
b = loader._resolved
print(json.dumps({"kind": b and b.kind, "reason": b and b.reason, "error": error, "native": bool(b and b.library)}))
"""


def solve(**environment: str) -> dict[str, str]:
    """What a fresh process does that solves a system."""
    done = subprocess.run(
        [sys.executable, "-c", SOLVE], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return json.loads(done.stdout)


@pytest.fixture
def fake_tools(tmp_path: Path) -> Path:
    """A search path with no compiler on it, but with ninja."""
    tools = tmp_path / "bin"
    tools.mkdir()
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert ninja is not None
    (tools / "ninja").symlink_to(ninja)
    return tools


def test_off_runs_torch() -> None:
    found = solve(KECORE_NATIVE="off")
    assert (found["kind"], found["reason"], found["error"]) == ("torch", "KECORE_NATIVE=off", None)


def test_auto_takes_what_was_compiled_before() -> None:
    loader.active_backend()  # compiled now, if no test did before
    for mode in ("auto", "require", "jit", ""):
        assert solve(KECORE_NATIVE=mode)["kind"] == "jit"


def test_no_compiler_is_a_stated_fallback_or_an_error(fake_tools: Path, tmp_path: Path) -> None:
    place = {"PATH": str(fake_tools), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "CXX": "no-such-compiler"}
    found = solve(KECORE_NATIVE="auto", **place)
    assert (found["kind"], found["error"]) == ("torch", None)
    assert "aot: this installation has no compiled library; jit: no C++ compiler (no-such-compiler)" in found["reason"]
    found = solve(KECORE_NATIVE="require", **place)
    assert found["error"].startswith("NativeError: KECORE_NATIVE=require, but there is no native library: aot: ")
    assert found["kind"] is None


def test_no_ninja_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.which
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None if name == "ninja" else real(name))
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    monkeypatch.setattr(loader, "_resolved", None)
    monkeypatch.setenv("KECORE_NATIVE", "jit")
    with pytest.raises(NativeError, match="ninja is not installed; pip install ninja"):
        loader.active_backend()


def test_a_compiler_that_fails_is_not_tried_again_by_itself(fake_tools: Path, tmp_path: Path) -> None:
    """Its message is kept; forcing tries again."""
    count = tmp_path / "count"
    compiler = fake_tools / "g++"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho run >> {count}\n'
        'echo "k.cpp:1: error: this compiler is broken" >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    place = {
        "PATH": f"{fake_tools}{os.pathsep}/usr/bin{os.pathsep}/bin",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "CXX": str(compiler),
    }
    found = solve(KECORE_NATIVE="auto", **place)
    assert (found["kind"], found["error"]) == ("torch", None)
    assert "jit: compiling failed" in found["reason"]
    (report,) = (tmp_path / "extensions").glob("*/failed.txt")
    assert "error" in report.read_text(encoding="utf-8").lower()
    runs = count.read_text(encoding="utf-8")
    found = solve(KECORE_NATIVE="auto", **place)
    assert "compiling failed before" in found["reason"]
    assert count.read_text(encoding="utf-8") == runs
    assert "NativeError" in solve(KECORE_NATIVE="jit", **place)["error"]
    assert len(count.read_text(encoding="utf-8")) > len(runs)


@pytest.mark.slow
def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    """A lock that a killed process left does not stop them."""
    root = tmp_path / "extensions"
    environment = {**os.environ, "KECORE_NATIVE": "require", "TORCH_EXTENSIONS_DIR": str(root)}
    home, _ = toolchain.find_cuda()
    folder = root / f"kecore_{loader._fingerprint(home)}"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    command = [sys.executable, "-c", SOLVE]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    ended = [process.communicate(timeout=600) for process in started]
    assert all(json.loads(out)["native"] for out, _ in ended)
    assert sum("compiling native kernels once" in err for _, err in ended) == 1
    assert [file.name for file in root.glob("*/kecore_native*.so")] == ["kecore_native.so"]


def test_a_broken_nvcc_costs_no_cpu_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What nvcc said is the reason for CUDA alone; a toolkit that was repaired in its place is tried again."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'release 13.0'\n", encoding="utf-8")
    nvcc.chmod(0o755)
    compiled: list[Path | None] = []

    def compile_library(folder: Path, home: Path | None) -> None:
        compiled.append(home)
        if home is not None:
            (folder / "failed.txt").touch()
            raise loader._Unavailable("compiling failed: ptxas fatal")
        (folder / "kecore_native.so").touch()

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(loader, "_compile", compile_library)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    library, no_cuda = loader._load_jit(False)
    assert library.is_file()
    assert no_cuda == "with CUDA kernels, compiling failed: ptxas fatal"
    library, no_cuda = loader._load_jit(False)
    assert "compiling failed before" in no_cuda
    assert compiled == [tmp_path / "cuda", None]
    nvcc.write_text("#!/bin/sh\necho 'release 13.1'\n", encoding="utf-8")
    toolchain.print_version.cache_clear()
    assert loader._load_jit(False)[1] == "with CUDA kernels, compiling failed: ptxas fatal"
    toolchain.print_version.cache_clear()


@pytest.mark.parametrize(
    ("devices", "known", "architectures"),
    [
        ([(7, 5)], "compute_75 compute_80 compute_90", []),
        ([(7, 5), (9, 0)], "compute_75 compute_80 compute_90", ["90a"]),
        ([(12, 0)], "compute_75 compute_80 compute_90", []),
        ([], "compute_80 compute_86 compute_89 compute_90", ["80", "86", "89", "90a"]),
        ([], "nvcc does not run", ["100", "120", "80", "86", "89", "90a"]),
    ],
)
def test_architectures_are_what_kernels_compiler_and_devices_share(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    devices: list[tuple[int, int]],
    known: str,
    architectures: list[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: devices[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(toolchain, "print_version", lambda *command: known)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert toolchain.choose_architectures(tmp_path) == architectures
    home, reason = toolchain.find_cuda()
    assert (home is not None) == bool(architectures)
    assert ("capability 8.0 or newer" in reason) != bool(architectures)


@pytest.mark.parametrize(
    ("cuda", "compiler", "first"), [(True, True, "jit"), (True, False, "aot"), (False, True, "aot")]
)
def test_a_library_without_cuda_does_not_end_the_search(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: bool, compiler: bool, first: str
) -> None:
    library = tmp_path / "_C.so"
    library.write_bytes(b"ke_second_moment_cpu")
    monkeypatch.setattr(loader, "_aot_library", lambda: library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(loader, "find_cuda", lambda: (tmp_path if compiler else None, ""))
    assert loader._preferred(("aot", "jit"))[0] == first
    library.write_bytes(b"... ke_second_moment_cuda ...")
    assert loader._preferred(("aot", "jit"))[0] == "aot"


def test_an_unknown_instruction_set_lists_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_resolved", None)
    monkeypatch.setenv("KECORE_CPU_ISA", "avx-512")
    with pytest.raises(ConfigError, match="'avx-512'; expected one of amx-bf16, avx512-bf16, avx512, avx2, generic"):
        loader.active_backend()
    source = (_build.source_dir() / "kernels" / "cpu_isa.cpp").read_text(encoding="utf-8")
    assert all(f'"{name}"' in source or name in ("avx512", "avx2", "generic") for name in loader._ISAS)


def test_what_passes_is_not_held_against_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is full now, and the capture of a graph: the next call asks again. A wrong sum stays wrong."""
    answers = iter([torch.OutOfMemoryError("CUDA out of memory"), "a sum came out wrong"])
    capturing = True

    def add() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(loader, "_cuda_verdicts", {})
    monkeypatch.setattr(loader, "_sum_on_cuda", add)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert "a graph is being captured" in loader._try_cuda()
    capturing = False
    assert loader._try_cuda() == "CUDA out of memory"
    assert [loader._try_cuda(), loader._try_cuda()] == ["a sum came out wrong"] * 2


def test_an_unwritable_cache_is_a_stated_fallback(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    found = solve(KECORE_NATIVE="auto", TORCH_EXTENSIONS_DIR=str(file))
    assert found["kind"] == "torch"
    assert "cannot be used" in found["reason"]


def test_processors_that_torch_serves_better_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_resolved", None)
    monkeypatch.setenv("KECORE_NATIVE", "auto")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    found = loader.active_backend()
    assert found.kind == "torch"
    assert "torch is faster on this processor" in found.reason
    assert loader.implementation(torch.device("cpu")) is reference


def test_an_unknown_mode_lists_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_resolved", None)
    monkeypatch.setenv("KECORE_NATIVE", "fast")
    with pytest.raises(ConfigError, match="'fast'; expected one of auto, aot, jit, require, off"):
        loader.active_backend()


def test_importing_compiles_nothing(tmp_path: Path) -> None:
    code = "import kecore.ops, kecore.ops.measure; from kecore.ops import loader; assert loader._resolved is None"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "KECORE_NATIVE": "require"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert not list(tmp_path.iterdir())


def test_the_key_covers_sources_and_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = {loader._fingerprint(None)}
    monkeypatch.setattr(_build, "CXX_FLAGS", (*_build.CXX_FLAGS, "-DX"))
    keys.add(loader._fingerprint(None))
    copied = shutil.copytree(_build.source_dir(), tmp_path / "csrc")
    monkeypatch.setattr(_build, "source_dir", lambda: copied)
    assert loader._fingerprint(None) in keys
    (copied / "kernels" / "cpu_tile.h").write_text("// another", encoding="utf-8")
    keys.add(loader._fingerprint(None))
    keys.add(loader._fingerprint(Path("/cuda")))
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("version", "wheels", "nvcc", "home", "words"),
    [
        (None, True, True, None, "torch is built without CUDA"),
        ("13.0", True, True, "wheels", ""),
        ("12.8", True, True, None, "wheels are of CUDA 13, torch is of 12.8"),
        ("12.8", False, True, "toolkit", ""),
        ("12.8", False, False, None, "no nvcc; pip install 'kecore[cuda]'"),
    ],
)
def test_where_nvcc_is_looked_for(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    version: str | None,
    wheels: bool,
    nvcc: bool,
    home: str | None,
    words: str,
) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(_build, "pip_cuda_home", lambda: tmp_path / "wheels" if wheels else None)
    monkeypatch.setattr(
        toolchain.shutil, "which", lambda _: str(tmp_path / "toolkit" / "bin" / "nvcc") if nvcc else None
    )
    found, reason = toolchain.find_cuda()
    assert found == (tmp_path / home if home else None)
    assert words in reason
    assert bool(words) == bool(reason)


@pytest.mark.parametrize(
    ("reason", "fails", "native"), [("", False, True), ("", True, False), ("built without CUDA", False, False)]
)
def test_cuda_tensors_run_in_torch_where_their_kernels_do_not(
    monkeypatch: pytest.MonkeyPatch, reason: str, fails: bool, native: bool
) -> None:
    """A kernel that does not run, for an old driver say, is found out before it is relied on."""
    monkeypatch.setattr(loader, "_cuda_verdicts", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    ones, zeros = torch.ones, torch.zeros

    def add(moments: list[torch.Tensor], keys: list[torch.Tensor]) -> None:
        if fails:
            raise RuntimeError("second_moment_: the NVIDIA driver is older than the CUDA runtime that was built in")
        moments[0] += keys[0].T @ keys[0]

    monkeypatch.setattr(loader, "_resolved", loader.Backend("jit", "", Path("x.so"), "avx2", reason))
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: zeros(*shape))
    monkeypatch.setattr(torch.ops, "kecore", SimpleNamespace(second_moment_=add))
    chosen = loader.implementation(torch.device("cuda"))
    assert (chosen is torch.ops.kecore) == native
    assert (chosen is reference) != native


def test_cuda_home_of_the_environment_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert toolchain.find_cuda() == (tmp_path, "")


def test_the_wheels_runtime_library_gets_the_name_that_the_linker_wants(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "build"
    (home / "lib").mkdir(parents=True)
    folder.mkdir()
    (home / "lib" / "libcudart.so.13").touch()
    for _ in range(2):
        assert toolchain.cuda_link_flags(folder, home) == [f"-L{folder}", f"-L{home / 'lib'}"]
    assert (folder / "libcudart.so").resolve() == (home / "lib" / "libcudart.so.13").resolve()
    assert toolchain.cuda_link_flags(folder, None) == []


def test_build_description_is_what_cmake_reads() -> None:
    def ask(key: str) -> list[str]:
        command = [sys.executable, str(_build.__file__), key]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(";")

    assert ask("architectures") == list(_build.ARCHITECTURES)
    assert ask("cpu-sources") == [str(file) for file in _build.sources("cpu")]
    assert all(Path(file).is_file() for kind in ("cpu", "cuda", "binding") for file in ask(f"{kind}-sources"))


def systems(n: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(2, 6, n, generator=generator)
    return k, torch.randn(2, 5, n, generator=generator), torch.ones(2, dtype=torch.float64)


FACTOR = torch.eye(6) + torch.ones(6, 6).tril(-1)
SAMPLES = {
    "second_moment_": [
        ([torch.zeros(6, 6), torch.zeros(4, 4)], [torch.ones(9, 6), torch.ones(9, 4)], None, None),
        ([torch.zeros(6, 6).double()], [torch.ones(9, 6).bfloat16()], None, torch.ones(9).bool()),
        ([torch.zeros(6, 6)], [torch.ones(9, 6)[:, :6]], torch.tensor([3, 3, 0]), None),
    ],
    "factor_product": [(FACTOR, systems()[0], transposed) for transposed in (False, True)],
    "gram_solve": [
        (systems()[0], systems()[2], None),
        (systems()[0], systems()[2], torch.ones(2, 2, 4, dtype=torch.float64)),
    ],
    "kv_solve": [
        (*systems(), FACTOR, None),
        (*systems(), None, torch.ones(2, 2, 3, dtype=torch.float64)),
        (*systems(9), FACTOR, None),
    ],
}


@pytest.mark.parametrize(("name", "sample"), [(name, i) for name in OPS for i in range(len(SAMPLES[name]))])
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
def test_opcheck(name: str, sample: int) -> None:
    """Schema, autograd registration, fake kernels and tracing, with the compiled kernels under them."""
    assert loader.active_backend().library is not None
    results = torch.library.opcheck(getattr(torch.ops.kecore, name).default, SAMPLES[name][sample])
    assert set(results.values()) == {"SUCCESS"}


def test_fake_kernels_refuse_what_kernels_do() -> None:
    fake = {"device": "meta"}
    with pytest.raises(RuntimeError, match="expected as many moments as keys"):
        torch.ops.kecore.second_moment_([], [torch.zeros(2, 3, **fake)])
    with pytest.raises(RuntimeError, match=r"expected moment \[d, d\]"):
        torch.ops.kecore.second_moment_([torch.zeros(3, 4, **fake)], [torch.zeros(2, 3, **fake)])
    with pytest.raises(RuntimeError, match=r"expected factor \[d, d\]"):
        torch.ops.kecore.factor_product(torch.zeros(3, 3, **fake), torch.zeros(1, 4, 2, **fake), False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.second_moment_([torch.zeros(3, 3)], [torch.zeros(2, 3).double()]), "a type that this function"),
        (lambda o: o.second_moment_([torch.zeros(3, 3)], [torch.zeros(2, 4)]), "expected moments"),
        (lambda o: o.second_moment_([torch.zeros(3, 3).t()], [torch.zeros(2, 3)]), "stride of 1"),
        (lambda o: o.second_moment_([torch.zeros(3, 3)], [torch.zeros(2, 3)], torch.tensor([2])), "row out of range"),
        (lambda o: o.second_moment_([torch.zeros(3, 3)], [torch.zeros(2, 3)], None, torch.ones(2)), "mask of bool"),
        (lambda o: o.factor_product(torch.zeros(3, 3), torch.zeros(1, 3, 2).double(), False), "of float32"),
        (lambda o: o.factor_product(torch.zeros(3, 4), torch.zeros(1, 3, 2), False), "expected factor"),
        (lambda o: o.gram_solve(torch.zeros(2, 3, 1), torch.zeros(3).double(), None), "expected ridge"),
        (lambda o: o.gram_solve(torch.zeros(2, 3, 1), torch.zeros(2).double(), torch.zeros(2, 2, 1)), "shares"),
    ],
)
def test_the_binding_refuses_what_would_read_past_the_end(call: object, message: str) -> None:
    """Below the checks of the public functions, for who calls ``torch.ops.kecore``."""
    assert loader.active_backend().library is not None
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.kecore)  # type: ignore[operator]


def test_results_do_not_depend_on_threads() -> None:
    keys = torch.randn(700, 300, generator=torch.Generator().manual_seed(3))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            moment = torch.zeros(300, 300)
            loader.active_backend()
            torch.ops.kecore.second_moment_([moment], [keys])
            found.append((moment, torch.ops.kecore.factor_product(moment, keys.t()[None].contiguous(), True)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for pair in found[1:] for a, b in zip(pair, found[0], strict=True))
