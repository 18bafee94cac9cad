"""What pyproject.toml cannot say: packages from two roots, and the entry points.

The built-in methods stand in the same entry-point group that any other distribution may use.
"""

from pathlib import Path

from setuptools import find_packages, setup

METHODS = [
    "rome = kecore_methods.locate.rome:Rome",
    "memit = kecore_methods.locate.memit:Memit",
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

setup(
    packages=packages,
    package_dir=package_dir,
    package_data=package_data,
    entry_points={"console_scripts": ["kecore = kecore.cli:main"], "kecore.methods": METHODS},
)
