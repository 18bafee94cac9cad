from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, distributions
from pathlib import Path

import pytest

from kecore.api import registry
from kecore.api.errors import IncompatiblePluginError, KecoreWarning, MethodNotFoundError, PluginError
from kecore.api.method import METHOD_API
from kecore.api.registry import GROUP, Registry, check_contract

GOOD = """
from kecore.api.config import MethodConfig
from kecore.api.types import Capabilities

class Method:
    name = {name!r}
    Config = MethodConfig
    capabilities = Capabilities("weights", batch=True)
    reference = "Nobody, A Paper, 2026"
    api = (2, 2)

    def plan(self, view, batch, context):
        raise RuntimeError("not called here")
"""

Install = Callable[..., list[EntryPoint]]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs pretended distributions and returns all their entry points so far."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    made: list[str] = []

    def add(distribution: str, method: str, source: str | None = GOOD, target: str = "Method") -> list[EntryPoint]:
        module = f"fake_{distribution}_{method}".replace("-", "_").lower()
        made.append(module)
        (site / f"{module}.py").write_text(source.replace("{name!r}", repr(method)))
        info = site / f"{distribution}-1.5.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        with (info / "entry_points.txt").open("a") as file:
            if file.tell() == 0:
                file.write(f"[{GROUP}]\n")
            file.write(f"{method} = {module}:{target}\n")
        found = [p for d in distributions(path=[str(site)]) for p in d.entry_points]
        return [p for p in found if p.group == GROUP]

    yield add
    for module in made:
        sys.modules.pop(module, None)


def imported(module: str) -> bool:
    return module in sys.modules


def test_discovery_imports_nothing_and_get_imports_one(install: Install) -> None:
    install("kecore", "rome")
    found = Registry(install("other", "mine"))
    assert found.names() == ["mine", "rome"]
    assert not imported("fake_kecore_rome")
    method = found.get("rome")
    assert method.name == "rome"
    assert imported("fake_kecore_rome")
    assert not imported("fake_other_mine")
    assert found.get("rome") is method


@pytest.mark.parametrize("asked", ["ft-l", "FT-L", "ft_l", " Ft_L "])
def test_case_and_separators_do_not_matter(install: Install, asked: str) -> None:
    assert Registry(install("kecore", "ft-l")).get(asked).name == "ft-l"


def test_unknown_name_suggests_near_ones(install: Install) -> None:
    install("kecore", "memit")
    found = Registry(install("kecore", "rome"))
    with pytest.raises(MethodNotFoundError, match=r"no method 'memt'; did you mean 'memit'\? installed: memit, rome"):
        found.get("memt")
    with pytest.raises(MethodNotFoundError, match="no method 'xyz'; installed: memit, rome"):
        found.get("xyz")


def test_nothing_installed_says_how_to_install() -> None:
    with pytest.raises(MethodNotFoundError, match="pip install -e"):
        Registry([]).get("rome")


def test_broken_plugin_blocks_nobody_and_is_warned_of_once(install: Install) -> None:
    install("kecore", "rome")
    found = Registry(install("broken", "bad", "raise OSError('no such library')"))
    assert found.get("rome").name == "rome"
    with pytest.warns(KecoreWarning, match="bad.*broken.*no such library") as caught:
        rows = found.describe()
    assert len(caught) == 1
    assert found.describe() == rows  # and no second warning: warnings are errors here
    bad, rome = rows
    assert "OSError: no such library" in bad.error
    assert (bad.capabilities, bad.kind, bad.origin) == (None, None, "")
    assert not rome.error
    with pytest.raises(PluginError, match="uninstall broken") as raised:
        found.get("bad")
    assert isinstance(raised.value.__cause__, OSError)


def test_strict_raises_at_once(install: Install) -> None:
    points = install("broken", "bad", "import kecore_has_no_such_module")
    with pytest.raises(PluginError, match="kecore_has_no_such_module"):
        Registry(points, strict=True)


def test_missing_attribute_of_the_module_is_a_plugin_error(install: Install) -> None:
    with pytest.raises(PluginError, match="AttributeError"):
        Registry(install("other", "mine", target="Elsewhere")).get("mine")


def test_describe_tells_what_and_where(install: Install, tmp_path: Path) -> None:
    (row,) = Registry(install("other", "mine")).describe()
    assert (row.name, row.distribution, row.version, row.kind) == ("mine", "other", "1.5", "weights")
    file, _, line = row.origin.rpartition(":")
    assert Path(file).is_relative_to(tmp_path)
    assert Path(file).read_text().splitlines()[int(line) - 1] == "class Method:"
    plain = json.loads(json.dumps(row.to_json()))
    assert plain["capabilities"]["batch"] is True
    assert plain["kind"] == "weights"
    assert plain["reference"] == "Nobody, A Paper, 2026"


def test_two_strangers_with_one_name_are_both_named(install: Install) -> None:
    install("first", "mine")
    found = Registry(install("second", "Mine"))
    assert found.names() == ["Mine"]
    with pytest.raises(PluginError, match=r"first \(.*second \(|second \(.*first \("):
        found.get("mine")
    with pytest.warns(KecoreWarning, match="offered by both"):
        assert all("KECORE_PLUGINS" in row.error for row in found.describe())


def test_a_limit_settles_a_collision(install: Install) -> None:
    install("first", "mine")
    found = Registry(install("second", "mine"), only=["Second"])
    assert [row.distribution for row in found.describe()] == ["second"]


def test_built_in_names_cannot_be_shadowed(install: Install) -> None:
    install("kecore", "rome")
    found = Registry(install("aaa", "rome"))
    with pytest.warns(KecoreWarning, match="aaa offers a method 'rome', but that name belongs to kecore"):
        method = found.get("rome")
    assert method.__module__ == "fake_kecore_rome"
    assert not imported("fake_aaa_rome")
    ours, theirs = found.describe()
    assert (ours.distribution, ours.error) == ("kecore", "")
    assert "must choose another name" in theirs.error


@pytest.mark.parametrize(
    ("only", "names"),
    [
        (None, ["mine", "rome", "yours"]),
        ([], ["rome"]),
        (["Other_Dist"], ["mine", "rome"]),
    ],
)
def test_limit_keeps_built_ins(install: Install, only: list[str] | None, names: list[str]) -> None:
    install("kecore", "rome")
    install("other-dist", "mine")
    assert Registry(install("third", "yours"), only=only).names() == names


def test_excluded_method_says_that_it_is_excluded(install: Install) -> None:
    found = Registry(install("other", "mine"), only=[])
    with pytest.raises(MethodNotFoundError, match="installed by other, which KECORE_PLUGINS excludes"):
        found.get("mine")


def test_default_reads_the_environment(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("other", "mine")
    registry.default_registry.cache_clear()
    try:
        monkeypatch.setenv("KECORE_PLUGINS", "")
        assert "mine" not in registry.default_registry().names()
        assert "rome" in registry.default_registry().names()
        registry.default_registry.cache_clear()
        monkeypatch.setenv("KECORE_PLUGINS", "nobody, other")
        assert "mine" in registry.default_registry().names()
        registry.default_registry.cache_clear()
        monkeypatch.setenv("KECORE_STRICT_PLUGINS", "1")
        install("other", "bad", "1 / 0")
        with pytest.raises(PluginError, match="ZeroDivisionError"):
            registry.default_registry()
    finally:
        registry.default_registry.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("    name = 'other'", r"Method\.name must be the entry point's name 'mine'; got 'other'"),
        ("    Config = dict", r"Method\.Config must be a MethodConfig subclass; got <class 'dict'>"),
        ("    Config = None", r"Method\.Config must be a MethodConfig subclass; got None"),
        ("    capabilities = {}", r"Method\.capabilities must be a Capabilities object; got \{\}"),
        ("    reference = ' '", r"Method\.reference must be the paper"),
        ("    plan = None", r"Method\.plan must be a function plan"),
        ("    api = 1", r"api must be the lowest and highest METHOD_API"),
        ("    api = (2, 1)", r"api must be the lowest and highest METHOD_API"),
    ],
)
def test_each_breach_of_the_contract_has_its_message(install: Install, change: str, message: str) -> None:
    points = install("other", "mine", f"{GOOD}\n{change}\n")
    with pytest.raises(PluginError, match=message):
        Registry(points).get("mine")


def test_missing_attributes_and_functions_are_named() -> None:
    class Empty:
        api = (METHOD_API, METHOD_API)

    with pytest.raises(PluginError, match=r"method 'x': .*Empty\.name must be .*; it is missing"):
        check_contract(Empty, "x")
    with pytest.raises(PluginError, match="must lead to a class, got <function"):
        check_contract(lambda: None, "x")


@pytest.mark.parametrize(
    ("api", "remedy"),
    [
        ((METHOD_API + 1, METHOD_API + 2), "update kecore"),
        ((METHOD_API - 1, METHOD_API - 1), "update the plugin"),
    ],
)
def test_other_interface_version_is_incompatible(install: Install, api: tuple[int, int], remedy: str) -> None:
    points = install("other", "mine", f"{GOOD}\n    api = {api}\n")
    with pytest.raises(IncompatiblePluginError, match=remedy):
        Registry(points).get("mine")


def test_entry_point_without_distribution_works(install: Install) -> None:
    (point,) = install("other", "mine")
    bare = EntryPoint(point.name, point.value, point.group)
    found = Registry([bare])
    assert found.get("mine").name == "mine"
    assert found.describe()[0].distribution == ""
