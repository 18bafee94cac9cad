"""The house: which module may import which, read from the sources and held by a test.

``python -m kecore.testing.structure`` prints the floors with their sizes, every import that goes upward, and every
circle. Imports inside functions count like those at the top. Imports under ``if TYPE_CHECKING:`` do not: they are never
run, and an annotation may name what stands above.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

__all__ = ["CORE", "FLOORS", "PLUGINS", "Floor", "Import", "circles", "imports_of", "modules_of", "upward_imports"]

CORE = "kecore"
PLUGINS = (
    "kecore_methods",
    "kecore_datasets",
    "kecore_metrics",
    "kecore_analysis",
    "kecore_bench",
    "kecore_serve",
    "kecore_studio",
    "kecore_cpu",
)


@dataclass(frozen=True, slots=True)
class Floor:
    """Modules that may import what stands on their own floor and below it.

    Args:
        name: what the floor is called.
        packages: modules, each with everything inside it.
        closed: floors below that these modules may not import all the same.
    """

    name: str
    packages: tuple[str, ...]
    closed: tuple[str, ...] = ()


FLOORS = (
    Floor("ground", ("kecore", "kecore._version", "kecore._build", "kecore.foreign", "kecore.foreign_llama")),
    Floor("api", ("kecore.api",)),
    Floor("material", ("kecore.data", "kecore.files", "kecore.hub", "kecore.text", "kecore.batch", "kecore.corpus",
                       "kecore.models", "kecore.catalogue", "kecore.cache", "kecore.hparams")),
    Floor("ops", ("kecore.ops",)),
    Floor("model", ("kecore.model",)),
    Floor("memory", ("kecore.memory", "kecore.forecast")),
    Floor("edit", ("kecore.edit",)),
    Floor("statistics", ("kecore.statistics",)),
    Floor("inference", ("kecore.inference",)),
    Floor("engine", ("kecore.engine",)),
    Floor("evaluate", ("kecore.evaluate",)),
    Floor("session", ("kecore.trained", "kecore.training", "kecore.checkpoint",
                      "kecore.environment", "kecore.facts", "kecore.serving", "kecore.statistics_source",
                      "kecore.card", "kecore.sharing", "kecore.doctor", "kecore.editor", "kecore.journal",
                      "kecore.retry", "kecore.selftest")),
    Floor("testing", ("kecore.testing",)),
    Floor("accelerators", ("kecore_cpu",), closed=("testing",)),
    Floor("metrics", ("kecore_metrics",), closed=("testing",)),
    Floor("cli", ("kecore.cli",), closed=("testing",)),
    Floor("methods", ("kecore_methods",), closed=("testing", "cli")),
    Floor("datasets", ("kecore_datasets",), closed=("testing", "methods")),
    Floor("analysis", ("kecore_analysis",), closed=("testing", "datasets")),
    Floor("bench", ("kecore_bench",), closed=("testing", "datasets", "methods", "analysis")),
    Floor("serve", ("kecore_serve",), closed=("testing", "datasets", "methods", "bench")),
    Floor("studio", ("kecore_studio",), closed=("testing", "datasets", "methods")),
)  # fmt: skip
"""From the ground up."""


@dataclass(frozen=True, slots=True)
class Import:
    """One module imports another.

    Args:
        importer: the module that imports.
        imported: the module that is imported.
        line: where, in the importer's file.
    """

    importer: str
    imported: str
    line: int


def modules_of(packages: Sequence[str]) -> dict[str, Path]:
    """Return the source files of packages by the names of their modules."""
    modules: dict[str, Path] = {}
    for package in packages:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue  # a distribution may come without some of the plugins
        root = Path(spec.submodule_search_locations[0])
        for path in sorted(root.rglob("*.py")):
            parts = (package, *path.relative_to(root).with_suffix("").parts)
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            modules[name] = path
    return modules


def imports_of(name: str, source: str, modules: Mapping[str, object]) -> Iterator[Import]:
    """Yield the imports of one module that lead to other modules of a tree.

    Args:
        name: the module's name.
        source: its text.
        modules: all modules of the tree, by name.
    """
    tree = ast.parse(source)
    annotations_only: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            annotations_only.update(ast.walk(node))
    for node in ast.walk(tree):
        if node in annotations_only:
            continue
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            # `from package import module` leads to the module, `from module import name` to the module as well.
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [target if target in modules else node.module for target in submodules]
        else:
            continue
        for target in dict.fromkeys(targets):
            if target in modules and target != name:
                yield Import(name, target, node.lineno)


def floor_of(module: str) -> int:
    """Return the height of the floor that a module stands on; the longest matching name decides.

    Raises:
        KeyError: the module stands on no floor: give it one in :data:`FLOORS`.
    """
    height, longest = -1, -1
    for index, floor in enumerate(FLOORS):
        for package in floor.packages:
            inside = module == package or (package != CORE and module.startswith(f"{package}."))
            if inside and len(package) > longest:
                height, longest = index, len(package)
    if height < 0:
        raise KeyError(f"{module} stands on no floor; name it in kecore.testing.structure.FLOORS")
    return height


def upward_imports(imports: Sequence[Import]) -> list[Import]:
    """Return the imports that lead to a higher floor, or to one that is closed to the importer."""
    wrong: list[Import] = []
    for item in imports:
        importer, imported = FLOORS[floor_of(item.importer)], FLOORS[floor_of(item.imported)]
        goes_up = floor_of(item.imported) > floor_of(item.importer)
        if goes_up or imported.name in importer.closed:
            wrong.append(item)
    return wrong


def circles(imports: Sequence[Import]) -> list[list[str]]:
    """Return circles of imports, each as the modules on it, until none is left that avoids those returned."""
    graph: dict[str, set[str]] = {}
    for item in imports:
        graph.setdefault(item.importer, set()).add(item.imported)
    closed: list[list[str]] = []
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle: list[str] = error.args[1]
            closed.append(circle)
            # The error lists a module before the one that imports it; without this import the circle is open.
            graph[circle[1]].discard(circle[0])
        else:
            return closed


def main() -> int:
    """Print the floors, upward imports and circles; return 1 where there is any of the latter two."""
    modules = modules_of((CORE, *PLUGINS))
    sources = {name: path.read_text(encoding="utf-8") for name, path in modules.items()}
    imports: list[Import] = []
    lines = [0] * len(FLOORS)
    for name, source in sources.items():
        imports += imports_of(name, source, modules)
        lines[floor_of(name)] += source.count("\n")
    report = [f"{floor.name:12}{count:>7,} lines" for floor, count in reversed(list(zip(FLOORS, lines, strict=True)))]
    wrong, loops = upward_imports(imports), circles(imports)
    report += [f"upward: {item.importer} imports {item.imported} (line {item.line})" for item in wrong]
    report += [f"circle: {' <- '.join(loop)}" for loop in loops]
    report.append(f"{len(modules)} modules, {len(imports)} imports, {len(wrong)} upward, {len(loops)} circles")
    sys.stdout.write("\n".join(report) + "\n")
    return 1 if wrong or loops else 0


if __name__ == "__main__":
    raise SystemExit(main())
