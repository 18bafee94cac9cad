"""Who may import whom: nothing goes upward, nothing goes in a circle, and the check sees what it is for."""

from __future__ import annotations

import pytest

from kecore.testing.structure import (
    CORE,
    FLOORS,
    PLUGINS,
    Import,
    circles,
    floor_of,
    imports_of,
    modules_of,
    upward_imports,
)


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    modules = modules_of((CORE, *PLUGINS))
    assert len(modules) > 200, "the tree was not found"
    return [
        item for name, path in modules.items() for item in imports_of(name, path.read_text(encoding="utf-8"), modules)
    ]


def test_no_import_goes_upward(imports: list[Import]) -> None:
    assert upward_imports(imports) == []


def test_no_import_goes_in_a_circle(imports: list[Import]) -> None:
    assert circles(imports) == []


TREE = {"kecore.api.types": None, "kecore.edit.base": None, "kecore.edit": None, "kecore_bench.store": None}


def seen(source: str, importer: str = "kecore.model.view") -> list[str]:
    return [item.imported for item in imports_of(importer, source, TREE)]


def test_imports_inside_functions_count_and_those_for_annotations_do_not() -> None:
    assert seen("from kecore.edit import base") == ["kecore.edit.base"]
    assert seen("from kecore.edit.base import Edit, attached") == ["kecore.edit.base"]
    assert seen("from kecore.edit import Edit") == ["kecore.edit"]
    assert seen("import kecore.api.types") == ["kecore.api.types"]
    assert seen("def f():\n    from kecore.edit import Edit") == ["kecore.edit"]
    assert seen("if TYPE_CHECKING:\n    from kecore.edit import Edit") == []
    assert seen("import torch\nfrom kecore.edit import base", "kecore.edit.base") == []


@pytest.mark.parametrize(
    ("importer", "imported", "wrong"),
    [
        ("kecore.api.types", "kecore.edit.base", True),
        ("kecore.edit.base", "kecore.api.types", False),
        ("kecore.edit.base", "kecore.edit.weight", False),
        ("kecore.editor", "kecore_bench.store", True),
        ("kecore_bench.store", "kecore.editor", False),
        ("kecore_methods.locate.memit", "kecore.cli.app", True),
        ("kecore_bench.cells", "kecore_methods.locate.memit", True),
    ],
)
def test_an_import_is_wrong_if_it_goes_up_or_to_a_closed_floor(importer: str, imported: str, wrong: bool) -> None:
    assert bool(upward_imports([Import(importer, imported, 1)])) is wrong


def test_circles_are_found_once_each() -> None:
    def edges(*names: str) -> list[Import]:
        return [Import(a, b, 1) for a, b in names]  # pyright: ignore[reportUnknownVariableType]

    assert circles(edges("ab", "bc")) == []
    (loop,) = circles(edges("ab", "bc", "ca", "cd"))
    assert set(loop) == {"a", "b", "c"}
    assert len(circles(edges("ab", "ba", "cd", "dc"))) == 2


def test_every_module_stands_on_one_floor() -> None:
    named = [package for floor in FLOORS for package in floor.packages]
    assert len(named) == len(set(named))
    with pytest.raises(KeyError, match="FLOORS"):
        floor_of("kecore.attic")
