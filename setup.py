"""What pyproject.toml cannot say: packages from two roots, and the entry points.

The built-in methods stand in the same entry-point group that any other distribution may use.

A wheel is pure Python and carries the native sources, which are compiled where it is installed. KECORE_BUILD_NATIVE=1
compiles them now instead; that takes torch at build time (``pip install --no-build-isolation``), and the wheel then
serves one platform, every Python from 3.10 on and every torch from 2.10 on.
"""

import os
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

METHODS = [
    "rome = kecore_methods.locate.rome:Rome",
    "memit = kecore_methods.locate.memit:Memit",
    "pmet = kecore_methods.locate.pmet:Pmet",
    "rect = kecore_methods.locate.rect:Rect",
    "prune = kecore_methods.locate.prune:Prune",
    "encore = kecore_methods.locate.encore:Encore",
    "ote-se = kecore_methods.locate.ote_se:OteSe",
    "emmet = kecore_methods.locate.emmet:Emmet",
    "alphaedit = kecore_methods.locate.alphaedit:AlphaEdit",
    "ft-l = kecore_methods.finetune.ft:FtL",
    "ft-m = kecore_methods.finetune.ft:FtM",
]

packages = find_packages(include=["kecore", "kecore.*"]) + find_packages("plugins", include=["kecore_methods*"])
package_dir = {"kecore_methods": "plugins/kecore_methods"}
package_data = {"": ["*.json"], "kecore": ["py.typed"], "kecore.data": ["*"]}

if Path("csrc").is_dir():
    # The sources travel in the wheel, so that an installed kecore can compile them at first use.
    packages.append("kecore._csrc")
    package_dir["kecore._csrc"] = "csrc"
    package_data["kecore._csrc"] = ["**/*.h", "**/*.cuh", "**/*.cpp", "**/*.cu"]


def native() -> dict[str, Any]:
    """Arguments of setup() that compile ``kecore/_C.abi3.so``; with CUDA where torch has it and an nvcc is found."""
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    spec = spec_from_file_location("_build", "kecore/_build.py")
    build = module_from_spec(spec)
    spec.loader.exec_module(build)
    kinds = ["cpu", "binding"] + ["cuda"] * (CUDA_HOME is not None)
    files = [os.path.relpath(file) for kind in kinds for file in build.sources(kind)]
    flags = {"cxx": [*build.CXX_FLAGS, *build.DEFINES]}
    if CUDA_HOME is not None:
        flags["cxx"] += build.CUDA_DEFINES
        flags["nvcc"] = [*build.NVCC_FLAGS, *build.gencode(build.ARCHITECTURES), build.PTX]
    kind = CppExtension if CUDA_HOME is None else CUDAExtension
    return {
        "ext_modules": [
            kind("kecore._C", files, extra_compile_args=flags, extra_link_args=["-pthread"], py_limited_api=True)
        ],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    **(native() if os.environ.get("KECORE_BUILD_NATIVE") == "1" else {}),
    packages=packages,
    package_dir=package_dir,
    package_data=package_data,
    entry_points={"console_scripts": ["kecore = kecore.cli:main"], "kecore.methods": METHODS},
)
