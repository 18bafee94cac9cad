"""Families of methods do not lean on each other: what two of them need stands in ``kecore.engine``."""

from __future__ import annotations

from kecore.testing.structure import imports_of, modules_of

SHARED = {"presets", "hparams"}  # published set-ups, and what other tools' files say, of each method


def family(module: str) -> str:
    """The folder of a module of ``kecore_methods``."""
    return module.split(".")[1]


def test_no_folder_of_methods_imports_another() -> None:
    modules = modules_of(("kecore_methods",))
    del modules["kecore_methods"]
    assert len({family(name) for name in modules}) >= 5
    crossing = [
        f"{item.importer} line {item.line}: {item.imported}"
        for name, path in modules.items()
        for item in imports_of(name, path.read_text(encoding="utf-8"), modules)
        if family(item.importer) != family(item.imported) and family(item.imported) not in SHARED
    ]
    assert crossing == []
