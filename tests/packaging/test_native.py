"""The native library of a wheel: compiled where the wheel lands, or ahead of time for every Python and torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from kecore import _build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
]

CHECK = """
import json, torch, kecore
from kecore.ops import loader, measure, OPS
found = measure.self_test()
backend = loader.active_backend()
k = torch.randn(1, 6, 3)
torch.library.opcheck(torch.ops.kecore.gram_solve.default, (k, torch.ones(1, dtype=torch.float64), None))
print(json.dumps({
    "file": kecore.__file__, "library": str(backend.library), "kind": backend.kind, "errors": [row[3] for row in found],
}))
"""


def check(site: Path, **environment: str) -> dict[str, object]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("KECORE_")}
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        capture_output=True,
        text=True,
        cwd=site.parent,
        env={**inherited, "PYTHONPATH": str(site), **environment},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["file"].startswith(str(site))
    assert all(error < 1e-6 for error in found["errors"])
    return found


def unpacked(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.parametrize("source", _build.sources("binding"), ids=lambda file: file.stem)
def test_the_cuda_part_of_the_binding_compiles(source: Path) -> None:
    """Which nothing here can link: a torch without CUDA lacks the symbols."""
    include = Path(torch.__file__).parent / "include"
    flags = [*_build.CXX_FLAGS, *_build.DEFINES, *_build.CUDA_DEFINES, "-fsyntax-only", "-isystem", str(include)]
    done = subprocess.run(["c++", *flags, "-Werror", str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pure_wheel_compiles_where_it_lands(wheel: Path, tmp_path: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    site = unpacked(wheel, tmp_path)
    found = check(site, KECORE_NATIVE="require", TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert found["kind"] == "jit"
    assert str(found["library"]).startswith(str(tmp_path / "extensions"))


def test_native_wheel_serves_every_python_and_torch(native_wheel: Path, tmp_path: Path) -> None:
    assert "-cp310-abi3-" in native_wheel.name
    site = unpacked(native_wheel, tmp_path)
    found = check(site, KECORE_NATIVE="aot", TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    library = site / "kecore" / "_C.abi3.so"
    assert (found["kind"], found["library"]) == ("aot", str(library))
    assert not (tmp_path / "extensions").exists()
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm to read the library's symbols with")
    listed = subprocess.run([nm, "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    symbols = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert any(name.startswith("aoti_torch_") for name in symbols)
    # Mangled names of at:: and c10:: differ between torch's versions, those of Python's API between Python's.
    assert not [name for name in symbols if name.startswith(("_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "Py", "_Py"))]
