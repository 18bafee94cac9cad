"""Proves that the wheels of ``kecore[cuda]`` are all that compiling the CUDA kernels takes, beside g++.

    python tests/packaging/cuda_wheels.py [FOLDER]

makes an environment in FOLDER that holds them and nothing else (250 MB), compiles every .cu file for every
architecture with no other nvcc on the search path, links it in the two ways that kecore does, and loads the
results. Run by hand, for what it downloads; docs/install.md says when it last passed.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def main(folder: Path) -> None:
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "venv", folder / "venv")
    run(python, "-m", "pip", "install", "--quiet", *requirements())
    ask = "import runpy, sys; sys.stdout.write(str(runpy.run_path(sys.argv[1])['pip_cuda_home']()))"
    home = Path(run(python, "-c", ask, ROOT / "kecore" / "_build.py"))
    build = description()
    flags = [*build.NVCC_FLAGS, *build.gencode(build.ARCHITECTURES), build.PTX]
    begin = time.perf_counter()
    nvcc = home / "bin" / "nvcc"
    sources = build.sources("cuda")
    # As CMake links: the runtime inside.
    run(nvcc, *flags, "-shared", "-cudart", "static", f"-L{home / 'lib'}", "-o", folder / "static.so", *sources)
    # As JIT links: objects of nvcc, then g++ with -lcudart, which the wheels have under a versioned name only.
    (folder / "libcudart.so").symlink_to(sorted((home / "lib").glob("libcudart.so.*"))[0])
    objects = [folder / f"{source.stem}.o" for source in sources]
    for source, target in zip(sources, objects, strict=True):
        run(nvcc, *flags, "-c", "-o", target, source)
    library = ["-shared", "-o", folder / "dynamic.so", *objects, f"-L{folder}", "-lcudart"]
    run("g++", *library, f"-Wl,-rpath,{home / 'lib'}")
    for name in ("static.so", "dynamic.so"):
        loaded = ctypes.CDLL(str(folder / name))
        assert loaded.ke_second_moment_cuda(None, -1, 0, 0, None) == 1, "a negative count is a bad argument"
    seconds = time.perf_counter() - begin
    version = run(nvcc, "--version").strip().splitlines()[-1]
    sys.stdout.write(
        f"{version}: {len(sources)} files, twice, {len(flags)} flags, {seconds:.0f} s: compiled and loaded\n"
    )


def requirements() -> list[str]:
    """The extra's requirements, from the metadata's source."""
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("\ncuda = [")[1].split("]")[0].splitlines()
    return [line.strip().strip('",').split(";")[0] for line in lines if line.strip()]


def description() -> ModuleType:
    spec = spec_from_file_location("_build", ROOT / "kecore" / "_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: str | Path) -> str:
    """Run a command that sees no toolkit of the system."""
    places = os.environ["PATH"].split(os.pathsep)
    clean = os.pathsep.join(place for place in places if not (Path(place) / "nvcc").exists())
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("CUDA", "NVCC"))}
    done = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**kept, "PATH": clean},
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]).resolve())
    else:
        with tempfile.TemporaryDirectory() as place:
            main(Path(place))
