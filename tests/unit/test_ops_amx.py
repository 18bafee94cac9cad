"""The AMX kernel on processors without AMX: its tile instructions replaced by what they mean, in C++.

What this cannot show is speed, and the order in which real tiles round.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kecore import _build

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is an extension of x86-64")
KE_BF16, KE_F32, KE_F64 = 2, 0, 3


class Layer(ctypes.Structure):
    """``ke_moment_layer`` of csrc/kernels/kecore.h."""

    _fields_ = [
        ("keys", ctypes.c_void_p),
        ("key_stride", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("d", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("n_rows", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("moment", ctypes.c_void_p),
        ("moment_stride", ctypes.c_int64),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    file = tmp_path_factory.mktemp("amx") / "libkecore_amx.so"
    flags = [*_build.CXX_FLAGS, "-O1", "-Werror", "-DKECORE_EMULATE_AMX", "-shared"]
    subprocess.run([compiler, *flags, "-o", str(file), *map(str, _build.sources("cpu"))], check=True)
    loaded = ctypes.CDLL(str(file))
    loaded.ke_cpu_isa.restype = ctypes.c_char_p
    return loaded


def add(library: ctypes.CDLL, total: Tensor, keys: Tensor, rows: Tensor | None = None) -> None:
    layer = Layer(keys.data_ptr(), keys.stride(0), *keys.shape, None, 0, None, total.data_ptr(), total.stride(0))
    if rows is not None:
        layer.rows, layer.n_rows = rows.data_ptr(), len(rows)
    kind = KE_F64 if total.dtype == torch.float64 else KE_F32
    assert library.ke_second_moment_cpu(ctypes.byref(layer), 1, KE_BF16, kind, 2) == 0


@pytest.mark.parametrize("moment", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("tokens", "d"), [(1, 1), (31, 16), (32, 32), (33, 31), (70, 100), (1100, 33), (513, 200), (40, 450)]
)
def test_tiles_add_the_lower_triangle(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, tokens: int, d: int, moment: torch.dtype
) -> None:
    monkeypatch.delenv("KECORE_CPU_ISA", raising=False)
    assert library.ke_cpu_isa() == b"amx-bf16"
    generator = torch.Generator().manual_seed(d)
    keys = torch.randn(tokens, d + 3, generator=generator).bfloat16()[:, 2 : d + 2]
    start = torch.randn(d, d + 1, generator=generator).to(moment)[:, :d]
    total = start.clone()
    add(library, total, keys)
    wanted = (keys.double().t() @ keys.double()).tril()
    assert float(((total - start).double() - wanted).norm() / wanted.norm()) < 1e-6
    assert torch.equal(total.triu(1), start.triu(1))
    rows = torch.randint(tokens, (tokens // 2 + 1,), generator=generator)
    total = torch.zeros(d, d, dtype=moment)
    add(library, total, keys, rows)
    wanted = (keys[rows].double().t() @ keys[rows].double()).tril()
    assert float((total.double() - wanted).norm() / wanted.norm()) < 1e-6


def test_real_tile_instructions_assemble(tmp_path: Path) -> None:
    """Without the emulation: the file compiles to code that holds them."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    (source,) = [file for file in _build.sources("cpu") if file.name == "cpu_amx.cpp"]
    out = tmp_path / "amx.s"
    subprocess.run([compiler, *_build.CXX_FLAGS, "-S", "-o", str(out), str(source)], check=True)
    text = out.read_text(encoding="utf-8")
    assert text.count("tdpbf16ps") >= 4
    assert "ldtilecfg" in text
